"""transformers is imported faster and is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.model import light_transformers as light

NAMES: light.Structure = {
    frozenset(): {"a.one": {"One", "Uno"}, "b": {"Bee"}},
    frozenset({"torch", "vision"}): {"a.two": {"Two"}},
}


def in_a_process(script: str, cache: Path, **env: str) -> tuple[str, str]:
    """What a script printed, and what it complained of, with a cache folder of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **env},
    )
    return done.stdout, done.stderr


COUNTING = """
import builtins, sys
opened = []
before = builtins.open
def note(file, *rest, **more):
    opened.append(str(file))
    return before(file, *rest, **more)

builtins.open = note
from mondrian_ft.model import light_transformers
from transformers import AutoTokenizer
import transformers.models
builtins.open = before
sources = [one for one in opened if "/transformers/models/" in one and one.endswith(".py")]
"""


@pytest.mark.slow
def test_what_its_models_export_is_what_it_would_read_itself(tmp_path: Path) -> None:
    """Read once by the first process and never by the second; with every prefix it is what
    transformers reads by itself."""
    script = (
        COUNTING
        + """
from pathlib import Path
from transformers.utils import import_utils

asked = import_utils.define_import_structure
models = asked.models
calls = [(models, "models"), (models / "__init__.py", None), (models / "auto/__init__.py", None)]
same = []
for call in calls:
    found = {needs: dict(modules) for needs, modules in asked(*call).items()}
    same.append(found == asked.read.__wrapped__(*call))
everything = asked(models)
print(len(sources) > 1000, same, len(everything) > 3, sum(map(len, everything.values())) > 1000)
"""
    )
    assert in_a_process(script, tmp_path) == ("True [True, True, True] True True\n", "")
    assert len(list((tmp_path / "mondrian_ft").iterdir())) == 1
    # The models that are really used are imported, and so read as any module is.
    assert in_a_process(script, tmp_path)[0].startswith("False [True, True, True]")


@pytest.mark.slow
def test_transformers_imported_before_is_left_as_it_is(tmp_path: Path) -> None:
    script = """
import transformers
from transformers.utils import import_utils
before = import_utils.define_import_structure
from mondrian_ft.model import light_transformers
from transformers import AutoTokenizer
print(import_utils.define_import_structure is before, AutoTokenizer.__name__)
"""
    assert in_a_process(script, tmp_path) == ("True AutoTokenizer\n", "")
    assert not (tmp_path / "mondrian_ft").exists()


@pytest.mark.slow
@pytest.mark.parametrize("use_torch", ["0", "1"])
def test_an_installed_torch_is_left_alone_on_request(tmp_path: Path, use_torch: str) -> None:
    """Where torch was installed every command took five seconds longer, for nothing. What stands in
    for it here tells when it is imported."""
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("print('imported'); raise SystemExit(3)")
    metadata = tmp_path / "torch-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    script = """
from mondrian_ft.model import base
from transformers.utils import is_torch_available
print(is_torch_available())
"""
    found = in_a_process(script, tmp_path / "cache", USE_TORCH=use_torch, PYTHONPATH=str(tmp_path))
    assert found == {"0": ("False\n", ""), "1": ("imported\n", "")}[use_torch]


def test_the_command_line_needs_no_torch() -> None:
    script = """
import os, sys
from mondrian_ft import __main__ as entry
entry._run = lambda argv, me: print(argv, os.environ["USE_TORCH"])
sys.argv[1:] = ["task=versions"]
entry.main()
"""
    env = {name: value for name, value in os.environ.items() if name != "USE_TORCH"}
    for given, expected in (({}, "0"), ({"USE_TORCH": "1"}, "1")):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**env, **given}
        )
        assert (done.stdout, done.stderr) == (f"['task=versions'] {expected}\n", "")


def test_what_is_hidden() -> None:
    """torch and its kin are missing as any other package is; nothing else is."""

    def available(pkg_name: str, return_version: bool = False) -> tuple[bool, str | None]:
        there = pkg_name in ("torch", "torchvision", "numpy")
        return there, ("1.0" if there else "N/A") if return_version else None

    hidden = light.hiding_torch(available)
    assert hidden("torch", return_version=True) == available("no such", return_version=True)
    assert hidden("torchvision") == (False, None)
    assert hidden("numpy", return_version=True) == (True, "1.0")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[light.Light, list]]:
    """Makes one with names of our own, and what it read, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = tmp_path / "models"
    models.mkdir()

    def make() -> tuple[light.Light, list[Any]]:
        read: list[Any] = []

        def reading(path: Any, prefix: str | None = None) -> Any:
            read.append((path, prefix))
            return {needs: dict(modules) for needs, modules in NAMES.items()}

        return light.Light(reading, models), read

    return make


def test_a_second_process_reads_nothing(made: Any) -> None:
    first, read = made()
    assert first(first.models) == NAMES
    assert read == [(first.models, None)]
    second, read = made()
    prefixed = second(second.models, "models")
    assert prefixed[frozenset()]["models.a.one"] == {"One", "Uno"}
    # transformers adds to what it was given, and asks again.
    prefixed[frozenset()]["its_own"] = {"Thing"}
    assert second(second.models / "__init__.py") == NAMES
    assert read == []
    assert second(Path("elsewhere"), "x") == NAMES
    assert read == [(Path("elsewhere"), "x")]


@pytest.mark.parametrize("damage", ["half", "empty", "list", "other names", "another key"])
def test_what_was_kept_and_is_damaged_is_read_anew(made: Any, damage: str) -> None:
    first, _ = made()
    first(first.models)
    file = light.cache_file(first.models)
    whole = file.read_bytes()
    kept = json.loads(whole)
    file.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "list": b"[]",
            "other names": json.dumps({"key": kept["key"], "structure": [[1, 2]]}).encode(),
            "another key": json.dumps({**kept, "key": ["1.0.0"]}).encode(),
        }[damage]
    )
    second, read = made()
    assert second(second.models) == NAMES
    assert len(read) == 1
    assert file.read_bytes() == whole


def test_another_version_is_read_anew_and_one_that_may_change_always(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made()[0](made()[0].models)
    monkeypatch.setattr(light, "version", lambda name: "99.0")
    newer, read = made()
    newer(newer.models)
    assert len(read) == 1
    monkeypatch.setattr(light, "version", lambda name: "99.1.dev0")
    for _ in range(2):
        source, read = made()
        source(source.models)
        assert len(read) == 1


def test_what_has_no_version_or_no_home_is_not_kept(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a copied package without metadata, or a container's user that nobody named."""

    def nameless(name: str) -> str:
        raise PackageNotFoundError(name)

    def homeless(models: Path) -> Path:
        return Path("~/.cache/mondrian_ft/names.json")

    monkeypatch.chdir(tmp_path)
    for name, stand_in in (("version", nameless), ("cache_file", homeless)):
        with monkeypatch.context() as patch:
            patch.setattr(light, name, stand_in)
            for _ in range(2):
                found, read = made()
                assert found(found.models) == NAMES
                assert len(read) == 1
    assert {item.name for item in tmp_path.iterdir()} == {"models"}


def test_a_cache_folder_that_cannot_be_written_costs_nothing_else(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        found, read = made()
        assert found(found.models) == NAMES
        assert len(read) == 1
