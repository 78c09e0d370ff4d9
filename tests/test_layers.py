"""The rooms keep their walls: read off the source, so nothing has to be imported."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from mondrian_ft.schema import GROUPS
from mondrian_ft.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1] / "mondrian_ft"

RANK = {
    "errors": -1,
    "files": 0,
    "identity": 0,
    "login": 0,
    "launched": 0,
    "scratch": 0,
    "data": 1,
    "model": 1,
    "registry": 1,
    "training": 2,
    "evaluation": 2,
    "serving": 3,
    "sample": 3,
    "report": 3,
    "pipeline": 4,
    "tasks": 5,
    "schema": 6,
    "sweepers": 6,
    "keys": 7,
    "config": 8,
    "tracking": 9,
    "run": 9,
    "help": 9,
    "explain": 10,
    "sweeping": 10,
    "__main__": 11,
}
"""A room imports rooms of a lower rank only; rooms of one rank do not know each other."""

DOMAIN = (
    "data",
    "model",
    "registry",
    "training",
    "evaluation",
    "serving",
    "sample",
    "report",
    "files",
    "identity",
)
SAME_RANK = {("run", "tracking")}
"""``run`` opens its trackers, and both lie below the entry point."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """The room a file belongs to; the package's own __init__ is nobody's."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, inside a function) of every import a run of ``path`` may execute.

    Imports for the type checker only are no imports.
    """
    package = ["mondrian_ft", *path.relative_to(ROOT).parts[:-1]]

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, inside
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            for name in node.names:
                yield ".".join([*stem, name.name]), inside
        for child in ast.iter_child_nodes(node):
            deeper = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, deeper)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    """errors <- {data, model, registry} <- {training, evaluation} <- {report, serving} <- tasks."""
    mine = room(path)
    if mine == "__init__":
        return
    assert mine in RANK, f"{mine} is a new room: give it a rank"
    for name, inside in imports(path):
        parts = name.split(".")
        if parts[0] != "mondrian_ft" or len(parts) < 2:
            continue
        other = parts[1]
        if other == mine or other.startswith("__version__"):
            continue
        if mine == "tasks" and other == "pipeline" and inside:
            continue
        assert other in RANK, f"{path.name} imports {name}, of a room without a rank"
        allowed = RANK[other] < RANK[mine] or (mine, other) in SAME_RANK
        assert allowed, f"{path.relative_to(ROOT)} ({mine}) imports {name} ({other})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_walls_to_the_outside(path: Path) -> None:
    """Domain code knows no Hydra, OmegaConf or W&B; data and registry no MLX; VLMs are model's."""
    mine = room(path)
    tops = {name.split(".")[0] for name, _ in imports(path)}
    if mine in DOMAIN:
        assert not tops & {"hydra", "omegaconf", "wandb"}
    if mine in ("data", "registry"):
        assert not tops & {"mlx", "mlx_vlm", "mlx_lm"}
    if mine != "model":
        assert "mlx_vlm" not in tops
    if path.relative_to(ROOT) != Path("evaluation/judge.py"):
        assert "openai" not in tops
    if mine in ("errors", "files", "identity", "registry"):
        assert not tops & {"numpy", "PIL", "pydantic", "rich"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_wait(path: Path) -> None:
    """Nothing that is imported to compose a config or to link pulls in a slow library."""
    light = (
        "errors",
        "files",
        "identity",
        "login",
        "data",
        "registry",
        "tasks",
        "schema",
        "keys",
        "config",
        "tracking",
        "run",
    )
    if room(path) not in (*light, "help", "explain", "pipeline", "__main__", "__init__"):
        return
    heavy = {"mlx", "mlx_vlm", "mlx_lm", "transformers", "matplotlib", "scipy", "wandb", "pandas"}
    at_once = {name.split(".")[0] for name, inside in imports(path) if not inside}
    assert not at_once & heavy


def reads() -> set[tuple[str, str]]:
    """(owner, key) of every ``owner.key`` in the package, the schemas' own files left out."""
    found = set()
    for path in modules():
        if room(path) in ("config", "help", "explain"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if isinstance(owner, ast.Attribute):
                    found.add((owner.attr, node.attr))
                elif isinstance(owner, ast.Name):
                    found.add((owner.id, node.attr))
    return found


def test_no_dead_keys() -> None:
    """A key exists only if some line reads it, as ``config.lora.rank`` or ``lora.rank``."""
    found = reads()
    dead = [
        f"{group}.{item.name}"
        for group, schema in GROUPS.items()
        for item in dataclasses.fields(schema)
        if (group, item.name) not in found
    ]
    dead += [
        f"task.{item.name} ({name})"
        for name, task in TASKS.items()
        for item in dataclasses.fields(task)
        if ("task", item.name) not in found
    ]
    assert not dead
    assert ("config", "experiment_name") in found


def test_an_optional_library_waits() -> None:
    """Without the extra ``judge`` everything else works, so only asking may import it."""
    found = list(imports(ROOT / "evaluation" / "judge.py"))
    assert {inside for name, inside in found if name.split(".")[0] == "openai"} == {True}
