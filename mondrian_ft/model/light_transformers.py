"""transformers, imported in less time; to be imported before mlx-vlm.

Importing it reads all its models' sources, some 1,600 files, to learn what they export, and again
when the first model's name is asked for: its own cache of the answers holds 128 folders of 1,100.
The second answer is made from the first here, which saves a sixth of importing mlx-vlm
(benchmarks/LOG.md). Where transformers is built otherwise, nothing is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# It announces on import that torch is missing; it is missing on purpose.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers
from transformers.utils import import_utils

MODELS = Path(transformers.__file__).parent / "models"
_read: Any = getattr(import_utils, "define_import_structure", None)


def structure(module_path: str | Path, prefix: str | None = None) -> Mapping[Any, Any]:
    """What ``define_import_structure`` says of a package: names by module by what they need."""
    if prefix is None and Path(module_path) == MODELS / "__init__.py":
        # As transformers asked for it when it was imported, so it is at hand; it has put the names
        # of its own modules in since.
        known = _read(MODELS, prefix="models")
        return {
            needs: {
                name.removeprefix("models."): names
                for name, names in modules.items()
                if name.startswith("models.")
            }
            for needs, modules in known.items()
        }
    return _read(module_path, prefix)


if _read is not None and "transformers.models" not in sys.modules:
    import_utils.define_import_structure = structure
