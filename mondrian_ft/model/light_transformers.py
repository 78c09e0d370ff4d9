"""transformers, imported in less time; to be imported before mlx-vlm.

transformers reads all its models' sources when it is imported, some 1,600 files, to learn what they
export, and again when the first model's name is asked for: its own cache of the answers holds 128
folders of 1,100. The answer is kept in the user's cache folder here, for the version and the folder
that it was read from, and the second one is made from the first.

It also imports torch wherever that is installed, for seconds, and mlx-vlm needs none of it. With
``USE_TORCH=0`` in the environment, which the command line sets unless it is set, transformers is
told that there is no torch, as its versions before 5 were by the same variable.

Where transformers is built otherwise, or was imported before, nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import MondrianError
from ..files import atomic_write_bytes

# It announces on import that torch is missing; it is missing on purpose.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Structure = dict[frozenset[str], dict[str, set[str]]]
"""Names by module by what the module needs, as transformers' ``define_import_structure`` has it."""

_FORM = 1
_UTILS = "transformers.utils.import_utils"
_NO = ("0", "FALSE", "NO", "OFF")


def without_torch() -> bool:
    """Whether transformers is to leave torch alone: asked for, and nobody has imported it yet."""
    return os.environ.get("USE_TORCH", "").upper() in _NO and "torch" not in sys.modules


def cache_file(models: Path) -> Path:
    """Where what a folder's models export is kept."""
    from platformdirs import user_cache_path

    place = hashlib.sha256(str(models).encode()).hexdigest()[:16]
    return user_cache_path("mondrian_ft", appauthor=False) / f"transformers-{place}.json"


def _key(models: Path) -> list[Any] | None:
    """What the answer belongs to; None for a version that may change under its own name, or that
    has none."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        return None
    if "dev" in installed or "+" in installed:
        return None
    return [_FORM, installed, str(models), models.stat().st_mtime_ns]


def _kept(file: Path, key: list[Any]) -> Structure | None:
    try:
        found = json.loads(file.read_bytes())
        if found["key"] != key:
            return None
        return {
            frozenset(needs): {name: set(names) for name, names in modules.items()}
            for needs, modules in found["structure"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # None was kept, or what lies there is not what was written: it is read anew.
        return None


def _keep(file: Path, key: list[Any], structure: Structure) -> None:
    told = [
        [sorted(needs), {name: sorted(names) for name, names in modules.items()}]
        for needs, modules in structure.items()
    ]
    try:
        atomic_write_bytes(file, json.dumps({"key": key, "structure": told}).encode())
    except MondrianError:
        # A folder that cannot be written to costs the next process half a second, and no more.
        return


class Light:
    """transformers' ``define_import_structure`` with a longer memory.

    Args:
        read: the function itself.
        models: transformers' folder of models.
    """

    def __init__(self, read: Any, models: Path) -> None:
        self.read = read
        self.models = models
        self._names: Structure | None = None

    def __call__(self, module_path: str | Path, prefix: str | None = None) -> Mapping[Any, Any]:
        """What a package exports: names by module, with ``prefix`` before them, by needs."""
        path = Path(module_path)
        if path not in (self.models, self.models / "__init__.py"):
            return self.read(module_path, prefix)
        start = f"{prefix}." if prefix else ""
        # The caller puts modules of its own in, so it gets mappings of its own.
        return {
            needs: {f"{start}{name}": names for name, names in modules.items()}
            for needs, modules in self._all().items()
        }

    def _all(self) -> Structure:
        if self._names is None:
            self._names = self._known()
        return self._names

    def _known(self) -> Structure:
        key, file = _key(self.models), cache_file(self.models)
        # A user without a home would be given a folder named ~ wherever the command is run.
        if key is None or not file.is_absolute():
            return self.read(self.models)
        names = _kept(file, key)
        if names is None:
            names = self.read(self.models)
            _keep(file, key, names)
        return names


def hiding_torch(available: Any) -> Any:
    """transformers' ``_is_package_available``, to which torch and what builds on it are absent."""

    def without(pkg_name: str, *arguments: Any, **named: Any) -> Any:
        absent = pkg_name.startswith("torch")
        # Of a name that nobody can have installed it says what it says of any that is missing.
        return available("torch is hidden" if absent else pkg_name, *arguments, **named)

    return without


def _lighten(module: ModuleType) -> None:
    read = getattr(module, "define_import_structure", None)
    models = Path(str(module.__file__)).parents[1] / "models"
    if read is not None and models.is_dir():
        module.define_import_structure = Light(read, models)  # type: ignore[attr-defined]
    available = getattr(module, "_is_package_available", None)
    if available is not None and without_torch():
        module._is_package_available = hiding_torch(available)  # type: ignore[attr-defined]


class _Hook(MetaPathFinder):
    """Changes what transformers knows of itself as soon as the module that holds it was run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _UTILS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_lighten(module: ModuleType) -> None:
                execute(module)
                _lighten(module)

            spec.loader.exec_module = and_lighten  # type: ignore[method-assign]
        return spec


_hook = _Hook()
sys.meta_path.insert(0, _hook)
try:
    import transformers  # noqa: F401
finally:
    sys.meta_path.remove(_hook)
