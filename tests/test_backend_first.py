"""MLX is imported only after the package's backend, which loads OpenBLAS before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "mondrian_ft"
MLX = ("mlx", "mlx_vlm", "mlx_lm")
MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "backend.py"]


def imported(node: ast.stmt) -> str | None:
    """``mlx`` for an import of MLX or of what imports it, ``backend`` for one of ours that does."""
    if isinstance(node, ast.Import):
        return "mlx" if any(name.name.split(".")[0] in MLX for name in node.names) else None
    if isinstance(node, ast.ImportFrom):
        if node.level == 0:
            return "mlx" if (node.module or "").split(".")[0] in MLX else None
        names = [*(node.module or "").split("."), *(name.name for name in node.names)]
        return "backend" if "backend" in names else None
    return None


def too_early(body: list[ast.stmt], ready: bool) -> Iterator[int]:
    """Lines that import MLX in a scope where nothing before them imported the backend.

    What a module imports, its functions have: they run later.
    """
    inner: list[list[ast.stmt]] = []
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        kind = imported(node)
        ready = ready or kind == "backend"
        if kind == "mlx" and not ready:
            yield node.lineno
        for name in ("body", "orelse", "finalbody"):
            inner.append(getattr(node, name, []))
    for block in inner:
        yield from too_early(block, ready)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_backend_comes_before_mlx(path: Path) -> None:
    """Promise: no order of imports leaves a process on MLX's own BLAS, which is ten times slower
    and says nothing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(too_early(tree.body, False)) == [], f"{path}: import ..model.backend first"


def test_the_check_sees_a_wrong_order() -> None:
    """The check itself: MLX first is found, the backend first is not."""
    wrong = "def train():\n    from mlx import optimizers\n    from ..model.backend import mx\n"
    right = "def train():\n    from ..model.backend import mx\n    from mlx import optimizers\n"
    assert list(too_early(ast.parse(wrong).body, False)) == [2]
    assert list(too_early(ast.parse(right).body, False)) == []
