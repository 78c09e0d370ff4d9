"""``python -m mondrian_ft`` with a fake model in the model's place; ``FAKE_MODEL`` is its knobs."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from mondrian_ft.__main__ import main
from mondrian_ft.pipeline import serving
from mondrian_ft.serving.protocol import State
from tests.serving.fake_model import FakeModel


def fake(*_: object) -> FakeModel:
    knobs = json.loads(os.environ.get("FAKE_MODEL", "{}"))
    if "state" in knobs:
        knobs["state"] = State(knobs["state"])
    return SlowToStop(**knobs)


class SlowToStop(FakeModel):
    """Needs a while to end, as a process does, and leaves a file once it has."""

    async def stop(self) -> None:
        await asyncio.sleep(0.2)
        Path("stopped").touch()


serving._supervisor = fake
try:
    code = main()
finally:
    assert not [name for name in sys.modules if name.split(".")[0] in ("mlx", "transformers")]
sys.exit(code)
