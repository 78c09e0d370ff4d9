"""transformers and PEFT as the reference; only with the extra ``parity``."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .reference import Rows

TEST_ALL = os.environ.get("MONDRIAN_FT_TEST_ALL") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs torch."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session", autouse=True)
def torch_is_there() -> None:
    """Skips, or fails under ``make test-all``, without the extra."""
    missing = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        told = f"{' and '.join(missing)} not installed; make parity installs the extra"
        (pytest.fail if TEST_ALL else pytest.skip)(told)
    with warnings.catch_warnings():
        # What PyTorch and PEFT deprecate of their own is theirs to mend.
        warnings.simplefilter("ignore")
        import peft  # noqa: F401  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def their_warnings() -> Iterator[None]:
    """PyTorch, PEFT and transformers warn of their own insides; missing keys are asserted on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def rows(lab: Any) -> Rows:
    """What both sides answer: text, pictures of two sizes, and a padded batch of all."""
    return Rows.of(lab)
