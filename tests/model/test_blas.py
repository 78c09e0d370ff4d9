"""OpenBLAS comes before MLX, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mondrian_ft.model import blas

MEASURE = """
import sys, time
{first}
import mlx.core as mx
from mondrian_ft.model.backend import describe
a = mx.random.normal((512, 512))
mx.eval(a @ a)
best = 0.0
for _ in range(8):
    started = time.perf_counter()
    mx.eval(a @ a)
    best = max(best, 2 * 512**3 / (time.perf_counter() - started) / 1e9)
print(best, describe(), sep="\\t")
"""

FIRST = {
    "backend": "import mondrian_ft.model.backend",
    "base": "import mondrian_ft.model.base",
    "optim": "import mondrian_ft.training.optim",
    "evaluator": "import mondrian_ft.evaluation.evaluator",
    "processor": (
        "from mondrian_ft.model.processor import image_processor, build_model\n"
        "from mondrian_ft.sample import model_dir\n"
        "image_processor(model_dir()); build_model(model_dir())"
    ),
}


def measure(first: str) -> tuple[float, str]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    speed, words = done.stdout.strip().splitlines()[-1].split("\t")
    return float(speed), words


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
@pytest.mark.parametrize("module", FIRST)
def test_products_run_on_openblas_whatever_comes_first(module: str) -> None:
    """The reference BLAS gives 2.5–6 GFLOP/s, OpenBLAS 100–200. The processor module once
    imported mlx-vlm first, and every product of the sample's pre-training was slow."""
    if blas.load_openblas() is None:
        pytest.skip("no OpenBLAS on this machine")
    speed, words = measure(FIRST[module])
    if words == "CUDA":
        pytest.skip("products run on the GPU")
    assert words == "CPU with OpenBLAS"
    assert speed > 12


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
def test_a_program_that_imported_mlx_first_is_told_the_truth() -> None:
    """It has MLX's own BLAS by then, and the run record once said OpenBLAS."""
    _, words = measure("")
    assert words == "CUDA" or words.startswith("CPU with MLX's own BLAS")


def test_nothing_to_load_is_none_and_an_unusable_library_is_passed_over(monkeypatch) -> None:
    """A broken candidate does not stop the next."""
    monkeypatch.setattr(blas, "_candidates", lambda: ["/no/such/libopenblas.so"])
    assert blas.load_openblas() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.load_openblas() is None
