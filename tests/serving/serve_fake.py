"""``python -m mondrian_ft`` with a fake model in the model's place; ``FAKE_MODEL`` is its knobs."""

from __future__ import annotations

import json
import os
import sys

from mondrian_ft.__main__ import main
from mondrian_ft.pipeline import serving
from mondrian_ft.serving.protocol import State
from tests.serving.fake_model import FakeModel


def fake(*_: object) -> FakeModel:
    knobs = json.loads(os.environ.get("FAKE_MODEL", "{}"))
    if "state" in knobs:
        knobs["state"] = State(knobs["state"])
    return FakeModel(**knobs)


serving._supervisor = fake
sys.exit(main())
