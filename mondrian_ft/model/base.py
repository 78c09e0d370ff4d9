"""Loading a base model: weights, tokenizer and picture processor, ready to be trained or asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .backend import default_dtype, mx, nn
from .encoder import Encoder
from .machine import RESTS_FROM
from .pictures import FixedPictures
from .plain import Plain, unfit
from .qwen3_vl import Qwen3VL

QUANTIZATION_GROUP = 64


@dataclass(frozen=True)
class Identity:
    """Which base this is; an adapter is bound to one.

    Attributes:
        name: the folder's or hub's name, as the config gave it.
        weights: 16 hexadecimal digits over config and weights, see :func:`weights_fingerprint`.
        quantization: ``none``, or bits and group size.
        dtype: floating-point type of the weights in memory.
    """

    name: str
    weights: str
    quantization: str
    dtype: str


@dataclass
class Base:
    """A loaded base model.

    Attributes:
        backbone: the forward (see :class:`Qwen3VL`).
        tokenizer: the model's own, from its folder.
        image_processor: what makes patches of photographs, see ``data.pixels``.
        identity: which base this is.
        folder: where it was loaded from.
        other_precision: whether adapters that were trained on the same weights quantised otherwise
            are taken.
        notice: called with a sentence when one was.
    """

    backbone: Qwen3VL
    tokenizer: Any
    image_processor: Any
    identity: Identity
    folder: Path
    other_precision: bool = False
    notice: Callable[[str], object] = lambda sentence: None

    @property
    def plain(self) -> bool:
        """Whether it is computed by mlx-vlm's own forward (`model.plain`); then it is trained and
        evaluated, but not served, merged or counted for memory."""
        return isinstance(self.backbone, Plain)

    @property
    def model(self) -> nn.Module:
        """The mlx-vlm module that LoRA layers are put into."""
        return self.backbone.model

    @property
    def tied(self) -> bool:
        """Whether the head's weights are the embedding's."""
        return bool(self.backbone.model.language_model.args.tie_word_embeddings)

    @property
    def tower_bytes(self) -> int:
        """Size of the vision tower's weights."""
        from mlx.utils import tree_flatten

        flat: list[Any] = tree_flatten(self.backbone.tower.parameters())  # pyright: ignore
        return sum(value.nbytes for _, value in flat)

    def rest_tower(self, *, least: int = RESTS_FROM) -> int:
        """Give the vision tower's weights back, to be read again when a picture needs them.

        Once every photograph's features are known nobody asks a frozen tower: 0.8 GB of
        Qwen3-VL-4B's 8.9.

        Args:
            least: bytes below which it stays.

        Returns:
            The bytes that were given back; 0 as well for a tower that is trained.
        """
        from mlx.utils import tree_flatten
        from mlx_vlm.utils import load_model

        tower: Any = self.backbone.tower
        size = self.tower_bytes
        if size < least or tree_flatten(tower.trainable_parameters()):
            return 0
        again: Any = load_model(self.folder, lazy=True)
        again.set_dtype(getattr(mx, self.identity.dtype))
        tower.update(again.vision_tower.parameters())
        mx.clear_cache()
        return size

    @cached_property
    def encoder(self) -> Encoder:
        """Texts to token ids, by the model's tokenizer and chat template."""
        name = self.identity.name
        return Encoder(self.tokenizer, self.backbone.image_token, self.folder, name)

    @property
    def end_tokens(self) -> frozenset[int]:
        """See `Encoder.end_tokens`."""
        return self.encoder.end_tokens

    @property
    def pad_token(self) -> int:
        """See `Encoder.pad_token`."""
        return self.encoder.pad_token

    def prompt_tokens(self, prompt: str, image_tokens: int) -> list[int]:
        """See `Encoder.prompt_tokens`."""
        return self.encoder.prompt_tokens(prompt, image_tokens)

    def text_prompt_tokens(self, prompt: str) -> list[int]:
        """See `Encoder.text_prompt_tokens`."""
        return self.encoder.text_prompt_tokens(prompt)

    def answer_tokens(self, answer: str) -> list[int]:
        """See `Encoder.answer_tokens`."""
        return self.encoder.answer_tokens(answer)

    def text(self, tokens: Sequence[int]) -> str:
        """See `Encoder.text`."""
        return self.encoder.text(tokens)


def load_base(
    path: str | Path,
    *,
    name: str | None = None,
    dtype: str = "auto",
    quantize_bits: int | None = None,
    lazy: bool = False,
    other_precision: bool = False,
    notice: Callable[[str], object] = lambda sentence: None,
) -> Base:
    """Load a base model.

    Args:
        path: a folder, or a Hugging Face id.
        name: what to call it in records; None for the path as it was given.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        quantize_bits: quantise the language model's matrices to 4 or 8 bits after loading.
        lazy: leave the weights on the disk until something computes with them; texts and pictures
            need none.
        other_precision, notice: see :class:`Base`.

    Raises:
        ModelError: the folder does not exist or is incomplete, the hub cannot be reached, or the
            architecture is not supported.
    """
    folder = _resolve(path)
    name = name or str(path)
    _check_folder(folder, name)
    from huggingface_hub.errors import StrictDataclassError
    from mlx_vlm.utils import load_model, load_processor

    try:
        model = load_model(folder, lazy=lazy)
        processor = load_processor(folder, add_detokenizer=False)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(f"{name} cannot be loaded from {folder}: {_first_line(error)}") from error
    wanted = default_dtype() if dtype == "auto" else getattr(mx, dtype)
    model.set_dtype(wanted)
    quantization = _quantize(model, quantize_bits, folder)
    model.freeze()
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    identity = Identity(
        name, weights_fingerprint(folder), quantization, str(wanted).removeprefix("mlx.core.")
    )
    backbone, pictures = _backbone(model, processor, folder, name)
    return Base(
        backbone,
        processor.tokenizer,
        pictures,
        identity,
        folder,
        other_precision,
        notice,
    )


def _backbone(model: Any, processor: Any, folder: Path, name: str) -> tuple[Any, Any]:
    """The forward for a model, and what makes its patches.

    A :class:`Plain` has of a :class:`Qwen3VL` what training and evaluation use.

    Raises:
        ModelError: it is an architecture that cannot be trained here.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    if kind == Qwen3VL.model_type:
        return Qwen3VL(model), processor.image_processor
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    reason = unfit(model, linear)
    image_token = image_token_of(config)
    pictures = getattr(processor, "image_processor", None)
    if not reason and (image_token is None or pictures is None):
        reason = "takes no pictures"
    if reason:
        raise ModelError(
            f"{name} is a {kind} model, which {reason}, so it cannot be trained here; use "
            f"{Qwen3VL.model_type} (such as Qwen/Qwen3-VL-4B-Instruct) or qwen2_5_vl"
        )
    assert image_token is not None
    merge = getattr(pictures, "merge_size", None)
    if merge is not None:
        return Plain(model, image_token=image_token, merge=int(merge)), pictures
    fixed = FixedPictures(processor, image_token, name)
    return Plain(model, image_token=image_token, merge=1, arguments=fixed.arguments), fixed


def image_token_of(config: Mapping[str, Any]) -> int | None:
    """The id of image tokens in a ``config.json``; architectures have two names for it."""
    found = config.get("image_token_id", config.get("image_token_index"))
    return None if found is None else int(found)


def load_encoder(path: str | Path, *, name: str | None = None) -> Encoder:
    """The part of a base model that turns texts into tokens; nothing is downloaded.

    Args:
        path: a folder, or a Hugging Face id that was downloaded before.
        name: what to call the model in errors; None for the path as it was given.

    Raises:
        ModelError: the model is not here, or its folder lacks a file.
    """
    folder = _resolve(path, download=False)
    name = name or str(path)
    _check_folder(folder, name)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_token = image_token_of(json.loads((folder / "config.json").read_text()))
        if image_token is None:
            raise KeyError("image_token_id")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name} has no tokenizer in {folder}: {_first_line(error)}") from error
    return Encoder(tokenizer, image_token, folder, name)


def weights_fingerprint(folder: Path) -> str:
    """16 hexadecimal digits that tell one base from another without reading all of it.

    Covers ``config.json`` and, of every safetensors file, name, size, header and 64 KiB at each of
    65 places: any training changes nearly every byte, so a sample of them is enough, and an 8 GB
    base is told apart in a fraction of a second.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, 1 << 26)))
            for part in range(65):
                stream.seek(max(0, (size - (1 << 16)) * part // 64))
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()[:16]


def quantizable(module: Any) -> bool:
    """Whether a module is a matrix whose inputs the groups of a quantisation divide."""
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % QUANTIZATION_GROUP == 0


_SMALL = ["*.json", "*.jinja", "*.txt"]
"""The files of a model that hold no weights."""


def front_folder(path: str | Path) -> Path:
    """The folder of a model's small files; of a Hugging Face id no weights are downloaded.

    Raises:
        ModelError: there is no such folder, or the hub cannot be reached.
    """
    return _resolve(path, patterns=_SMALL)


def _resolve(
    path: str | Path, *, download: bool = True, patterns: Sequence[str] = (*_SMALL, "*.safetensors")
) -> Path:
    """The model's folder, downloaded if it has to be and ``download`` allows it."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    looks_local = folder.is_absolute() or str(path).startswith((".", "~"))
    if looks_local or str(path).count("/") != 1:
        raise ModelError(
            f"model.path={path} is not a folder; give the folder of a downloaded model, a Hugging "
            "Face id such as Qwen/Qwen3-VL-4B-Instruct, or model=sample"
        )
    from huggingface_hub import snapshot_download

    if not download:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = snapshot_download(
                str(path), allow_patterns=list(patterns), local_files_only=True
            )
        except LocalEntryNotFoundError:
            raise ModelError(f"{path} has not been downloaded yet") from None
        return Path(found)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))
    except Exception as error:  # its errors and those of its HTTP client have no common base
        raise ModelError(
            f"model.path={path} is not a folder here and could not be downloaded from the Hugging "
            f"Face hub ({_first_line(error)}); check the name and the network, give the folder of "
            "a downloaded copy, or try model=sample"
        ) from error


def _check_folder(folder: Path, name: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no model folder ({name})")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no .safetensors file; download {name} completely")
    try:
        kind = json.loads(config.read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise ModelError(f"{config} is no JSON object; download {name} again") from None
    if not isinstance(kind, str):
        raise ModelError(
            f"{config} names no model_type, so nobody can tell what it is; download {name} again"
        )


def _quantize(model: Any, bits: int | None, folder: Path) -> str:
    """Quantise the language model in place, if asked; says how the model is quantised now."""
    stored = json.loads((folder / "config.json").read_text()).get("quantization")
    if stored:
        if bits is not None and bits != stored.get("bits"):
            raise ModelError(
                f"model.quantize_bits={bits}, but {folder} is quantised to {stored.get('bits')} "
                "bits already; leave model.quantize_bits empty"
            )
        return f"{stored.get('bits')} bits, groups of {stored.get('group_size')}"
    if bits is None:
        return "none"

    if not any(quantizable(module) for _, module in model.language_model.named_modules()):
        raise ModelError(
            f"model.quantize_bits={bits}, but no matrix of {folder} has a multiple of "
            f"{QUANTIZATION_GROUP} inputs, so nothing would be quantised; leave it empty"
        )
    nn.quantize(
        model.language_model,
        QUANTIZATION_GROUP,
        bits,
        class_predicate=lambda _, module: quantizable(module),
    )
    return f"{bits} bits, groups of {QUANTIZATION_GROUP}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
