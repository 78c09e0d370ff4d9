"""transformers is imported faster and is the same."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_what_its_models_export_is_what_it_would_read_itself() -> None:
    """And it is not read a second time: no source of a model is opened by asking for a name."""
    script = """
import builtins
from mondrian_ft.model import light_transformers as light
from pathlib import Path

opened = []
before = builtins.open
def note(file, *rest, **more):
    opened.append(str(file))
    return before(file, *rest, **more)

builtins.open = note
from transformers import AutoTokenizer
import transformers.models
builtins.open = before
sources = [one for one in opened if str(light.MODELS) in one]
own = light._read(str(light.MODELS / "__init__.py"))
made = light.structure(str(light.MODELS / "__init__.py"))
auto = light.MODELS / "auto" / "__init__.py"
print(own == made, len(own) > 3, light.structure(auto) == light._read(auto), len(sources) < 100)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("True True True True\n", "")
