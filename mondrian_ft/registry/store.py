"""Version directories: what may be copied into one, and whether one is still what it was."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RegistryError
from ..files import sha256_file
from ..identity import identity_hash, safetensors_fault

MANIFEST, CONFIG, WEIGHTS = "manifest.json", "adapter_config.json", "adapter_model.safetensors"
REQUIRED = (MANIFEST, CONFIG, WEIGHTS)
REPORT = Path("evaluation", "comparison_report.json")
TEMPORARY = ".tmp-"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"v[1-9][0-9]*")
_LEFT_BEHIND = ("checkpoints",)  # beside an adapter in its folder, and no part of it


def home_of(root: Path, name: str) -> Path:
    """The folder of one adapter name.

    Raises:
        RegistryError: the name could lead elsewhere.
    """
    if not _NAME.fullmatch(name):
        raise RegistryError(f"registry.name is {name!r}; use letters, digits, '.', '_' and '-'.")
    return Path(root).absolute() / name


def check_channel(channel: str) -> None:
    """A channel's name is a word, and no version's.

    Raises:
        RegistryError: it is not.
    """
    if not _NAME.fullmatch(channel) or is_label(channel):
        raise RegistryError(f"The channel {channel!r} is no plain word; choose one, as candidate.")


def is_label(word: str) -> bool:
    """Whether a word is written as versions are: v1, v2, …"""
    return _VERSION.fullmatch(word) is not None


def labels(home: Path) -> list[str]:
    """Version folders that lie there, in their numbers' order, registered or not."""
    found = [path.name for path in home.glob("v*") if is_label(path.name)]
    return sorted(found, key=lambda label: int(label[1:]))


def load(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RegistryError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} cannot be read ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise RegistryError(f"{path} holds no JSON object; restore it.")
    return content


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of an adapter directory, after checking that the folder is one.

    Raises:
        RegistryError: a file or a key is missing.
    """
    missing = [name for name in REQUIRED if not (folder / name).is_file()]
    if missing:
        what = f"has no {missing[0]}" if folder.is_dir() else "does not exist"
        raise RegistryError(f"{folder} {what}; give the adapter directory that task=train wrote.")
    manifest = load(folder / MANIFEST)
    absent = [key for key in ("hash", "base", "data_lock", "created") if key not in manifest]
    if absent or not re.fullmatch(r"[0-9a-f]{64}", str(manifest["hash"])):
        what = (
            f"no {absent[0]!r}" if absent else f"the hash {manifest['hash']!r}, not 64 hex digits"
        )
        raise RegistryError(f"{folder / MANIFEST} has {what}; train the adapter again.")
    return manifest


def check_adapter(folder: Path) -> dict[str, Any]:
    """Read an adapter directory whole, and hold it against its manifest, which is returned.

    Raises:
        RegistryError: the weights are damaged or of another kind, or the manifest, the config and
            the weights do not belong together.
    """
    manifest = manifest_of(folder)
    weights = (folder / WEIGHTS).read_bytes()
    if fault := safetensors_fault(weights):
        raise RegistryError(
            f"{folder / WEIGHTS} {fault}; restore the file, or train the adapter again."
        )
    about = manifest.get("lora")
    scale = about.get("scale") if isinstance(about, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise RegistryError(
            f"{folder / MANIFEST} gives no effective scale (lora.scale is {scale!r}); restore it, "
            "or train the adapter again."
        )
    found = identity_hash(weights, float(scale))
    if found != manifest["hash"]:
        raise RegistryError(
            f"{folder}: weights and scale {scale:g} have the hash {found[:12]}, {MANIFEST} says "
            f"{manifest['hash'][:12]}; the weights were damaged or the manifest was edited, so "
            "restore them, or train the adapter again."
        )
    _check_config(folder, float(scale))
    return manifest


def _check_config(folder: Path, scale: float) -> None:
    """PEFT's file must speak of the same scale, since whoever loads it with PEFT goes by it."""
    config = load(folder / CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise RegistryError(
            f"{folder / CONFIG} gives no rank or alpha (r is {rank!r}, lora_alpha {alpha!r}); "
            "restore it, or train the adapter again."
        )
    stated = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not math.isclose(stated, scale, rel_tol=1e-6):
        raise RegistryError(
            f"{folder}: {CONFIG} gives an effective scale of {stated:g}, {MANIFEST} {scale:g}; one "
            "of them was edited, so restore it, or train the adapter again."
        )


def contents(source: Path) -> list[str]:
    """Files of an adapter directory that belong to a version, relative, in order.

    Hidden ones and checkpoints do not. A link to a file within the directory is one.

    Raises:
        RegistryError: a link leads outside or in a circle, or something is neither file nor folder.
    """
    inside = source.resolve()

    def walk(folder: Path, way: tuple[Path, ...]) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or (folder == source and path.name in _LEFT_BEHIND):
                continue
            # Looked at first: opening a pipe would wait for whoever writes into it.
            real = _real(path, inside)
            mode = real.stat().st_mode
            if stat.S_ISDIR(mode):
                if real in way:
                    raise RegistryError(
                        f"{path} is a link to a folder that it lies in, a circle; remove it."
                    )
                yield from walk(path, (*way, real))
            elif stat.S_ISREG(mode):
                yield path
            else:
                raise RegistryError(
                    f"{path} is neither a file nor a folder (a pipe, socket or device); remove it."
                )

    return [path.relative_to(source).as_posix() for path in walk(source, (inside,))]


def _real(path: Path, inside: Path) -> Path:
    """Where a path leads, which must be below ``inside``."""
    if not path.is_symlink():
        return path.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        loop = isinstance(error, RuntimeError) or error.errno == errno.ELOOP
        what = "leads in a circle" if loop else f"leads to {path.readlink()}, which does not exist"
        raise RegistryError(f"The link {path} {what}; remove it, or put the file there.") from error
    if not real.is_relative_to(inside):
        raise RegistryError(
            f"The link {path} leads outside its folder, to {real}; copy the adapter with its files "
            f"(cp -rL {inside} …) and give that folder."
        )
    return real


def copy(source: Path, target: Path) -> None:
    """Copy what belongs to a version, read-only, and flushed to the disk."""
    target.mkdir()
    folders = {target}
    for name in contents(source):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        folders |= {folder for folder in place.parents if folder.is_relative_to(target)}
        shutil.copyfile(source / name, place)
        place.chmod(0o444)
        flush(place)
    for folder in folders:
        flush(folder)


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def check_unchanged(folder: Path, files: Mapping[str, str]) -> None:
    """Hold a version directory against the hashes that were written down when it was registered.

    Raises:
        RegistryError: naming the first file that is missing, changed or new.
    """
    advice = "restore it from a copy, or roll the channel back."
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            raise RegistryError(f"{path} is missing from the registered version; {advice}")
        if sha256_file(path) != known:
            raise RegistryError(
                f"{path} was changed after it was registered (its SHA-256 is no longer "
                f"{known[:12]}…); {advice}"
            )
    there = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    foreign = sorted(path for path in there if path.relative_to(folder).as_posix() not in files)
    if foreign:
        raise RegistryError(
            f"{foreign[0]} was added after the version was registered; move it away."
        )


def flush(path: Path) -> None:
    """Bring a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
