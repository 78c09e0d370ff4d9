"""Folders of other architectures, small enough to train in a test: random weights, the sample's
tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 1024,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
IMAGE, VIDEO, START = 6, 7, 3
"""Tokens of the sample's tokenizer."""


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """A tower with windows, patches of 14 × 14 pixels, no DeepStack; biases in the attention."""
    from mlx_vlm.models.qwen2_5_vl.config import ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.models.qwen2_5_vl.qwen2_5_vl import Model

    config = {
        **TEXT,
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "fullatt_block_indexes": [1],
        },
    }
    made: Any = ModelConfig.from_dict(dict(config))
    made.text_config = TextConfig.from_dict(config)
    made.vision_config = VisionConfig.from_dict(config["vision_config"])
    return write(folder, Model(made), config, seed, {"patch_size": 14})


def qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """The family before it."""
    from mlx_vlm.models.qwen2_vl.config import ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.models.qwen2_vl.qwen2_vl import Model

    config = {
        **TEXT,
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
    }
    made: Any = ModelConfig.from_dict(dict(config))
    made.text_config = TextConfig.from_dict(config)
    made.vision_config = VisionConfig.from_dict(config["vision_config"])
    return write(folder, Model(made), config, seed, {"patch_size": 14})


def llava(folder: Path, seed: int = 0) -> Path:
    """Every picture in one square of 4 tokens, another tower, projector and decoder."""
    from mlx_vlm.models.llava.config import ModelConfig, TextConfig, VisionConfig
    from mlx_vlm.models.llava.llava import Model

    config = {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    }
    made: Any = ModelConfig.from_dict(dict(config))
    made.text_config = TextConfig.from_dict(config["text_config"])
    made.vision_config = VisionConfig.from_dict(config["vision_config"])
    square = {"height": 56, "width": 56}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "crop_size": square,
        "size": {"shortest_edge": 56},
        "do_center_crop": True,
        "do_resize": True,
    }
    folder = write(folder, Model(made), config, seed, processor)
    settings = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "image_token": "<|image_pad|>",
        "num_additional_image_tokens": 1,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def write(
    folder: Path, model: Any, config: dict[str, Any], seed: int, processor: dict[str, Any]
) -> Path:
    """A model folder in mlx-vlm's own layout."""
    from mlx.utils import tree_flatten

    from mondrian_ft.model.backend import mx
    from mondrian_ft.sample import model_dir

    shutil.copytree(model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 0]}))
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    if "image_processor_type" in processor:
        settings = {}
    file.write_text(json.dumps(settings | processor))
    mx.random.seed(seed)
    flat: Any = tree_flatten(model.parameters())
    fresh = {
        name: mx.random.normal(value.shape) * 0.1 + (1.0 if name.endswith("norm.weight") else 0.0)
        for name, value in flat
    }
    mx.save_safetensors(str(folder / "model.safetensors"), fresh, {"format": "mlx"})
    return folder
