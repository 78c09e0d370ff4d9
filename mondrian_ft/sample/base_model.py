"""The sample base model's folder: a Qwen3-VL in miniature, its tokenizer, its processor.

Architecture, file names and special tokens are Qwen3-VL's own; only the numbers are small, so
that everything that works on it goes through the same code as the 4B model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 1024
MAX_PIXELS = 24_576
"""Pixel cap of the sample: at most 24 image tokens (32 × 32 pixels each) a photograph."""
MIN_PIXELS = 4_096

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen2's pre-tokenizer: contractions, words, single digits, punctuation runs, white space.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TURN = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
)
"""What the template puts before and after the prompt of one turn with one picture."""


def config(tokens: dict[str, int]) -> dict[str, Any]:
    """``config.json`` in the layout of the published Qwen3-VL checkpoints; tokens maps to ids."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]],
        "tie_word_embeddings": True,
        "dtype": "float32",
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 100000,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [12, 10, 10],
                "rope_type": "default",
            },
            "tie_word_embeddings": True,
            "bos_token_id": tokens["<|endoftext|>"],
            "eos_token_id": tokens["<|im_end|>"],
            "dtype": "float32",
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "hidden_size": 96,
            "intermediate_size": 256,
            "depth": 4,
            "num_heads": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [1],
            "initializer_range": 0.02,
        },
    }


def write_tokenizer(folder: Path, texts: Iterable[str]) -> dict[str, int]:
    """Train a byte-level BPE with Qwen's pre-tokenizer and write the folder's text side.

    Returns:
        The ids of :data:`SPECIAL_TOKENS`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {token: int(tokenizer.token_to_id(token) or 0) for token in SPECIAL_TOKENS}
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 32768,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "split_special_tokens": False,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "added_tokens_decoder": {
                str(token_id): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token, token_id in tokens.items()
            },
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokens


def write_settings(folder: Path, tokens: dict[str, int]) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``preprocessor_config.json``."""
    _write(folder / "config.json", config(tokens))
    _write(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [tokens["<|im_end|>"], tokens["<|endoftext|>"]],
            "pad_token_id": tokens["<|endoftext|>"],
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        },
    )


def to_published_names(parameters: dict[str, Any]) -> dict[str, Any]:
    """mlx-vlm's parameter names and layouts to the published (PyTorch) ones.

    The patch embedding's convolution is the only tensor whose axes differ: MLX keeps channels
    last.
    """
    renamed = {}
    for name, value in parameters.items():
        if name == "vision_tower.patch_embed.proj.weight":
            value = value.transpose(0, 4, 1, 2, 3)
        name = name.replace("language_model.model.", "model.language_model.", 1)
        name = name.replace("vision_tower.", "model.visual.", 1)
        name = name.replace("language_model.lm_head.", "lm_head.", 1)
        renamed[name] = value
    return renamed


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
