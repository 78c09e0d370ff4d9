"""``python -m benchmarks.random_model FOLDER``: Qwen3-VL-4B's shapes with random weights, on disk.

A model folder in the published layout, some 9 GB in bfloat16, that stands in for the base where it
cannot be downloaded: whatever is timed or run with it takes the way that the real one takes, and
answers nothing. Tokenizer, template and special tokens are the sample model's, which has 1,024 of
the 151,936 words. ``--layers`` and ``--hidden`` make a smaller one, to try the way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from .decode import Shapes, _config

KEPT = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def write(folder: Path, shapes: Shapes, dtype: str = "bfloat16") -> int:
    """Write the folder; returns the bytes of its weights.

    Raises:
        FileExistsError: the folder is there already.
    """
    from mlx.utils import tree_flatten

    from mondrian_ft.model import fuse, shards
    from mondrian_ft.model.backend import mx
    from mondrian_ft.model.processor import build_model
    from mondrian_ft.sample import model_dir

    shutil.copytree(model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    config, sample = _config(shapes), json.loads((model_dir() / "config.json").read_text())
    config |= {key: sample[key] for key in (*KEPT, "eos_token_id", "architectures")}
    config |= {"dtype": dtype, "tie_word_embeddings": True}
    config["text_config"] |= {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mx.random.seed(0)
    model = build_model(folder)
    model.set_dtype(getattr(mx, dtype))
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    entries = []
    for name, value in parameters.items():
        if value.ndim == 5:  # the patch embedding, whose channels MLX keeps last
            value = value.transpose(0, 4, 1, 2, 3)
        mx.eval(value)
        entries.append(shards.entry_of(fuse.to_published_name(name), value))
    shards.write_model(folder, entries, form="pt")
    return sum(entry.size for entry in entries)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=Shapes.layers)
    parser.add_argument("--hidden", type=int, default=Shapes.hidden)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    shapes = Shapes(layers=arguments.layers, hidden=arguments.hidden)
    started = time.perf_counter()
    size = write(arguments.folder, shapes, arguments.dtype)
    print(f"{size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s: {arguments.folder}")


if __name__ == "__main__":
    main()
