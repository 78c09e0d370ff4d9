"""Who answers: one base, and adapters that are put into it and taken out again between steps.

An arm's name is looked up when an ask is taken up, so that a channel that was moved is followed at
once. What cannot be loaded and proved is refused with its reason; no other model answers instead.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import AdapterError, MondrianError
from ..model import adapter as adapters
from ..model import answering, lora
from ..model.base import Base
from ..model.decode import Steps
from ..model.probe import ProbeInputs
from .protocol import BASE, Identity

FAILURE_KEPT = 5.0
"""Seconds for which an adapter that was refused is not tried again, if nothing changed on disk."""

Stamp = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, eq=False)
class Arm:
    """A model that can answer: the base, or the base with an adapter's layers.

    Compared by identity: another directory of the same weights is another arm, because it has to
    prove itself.

    Attributes:
        hash: the adapter's, None for the base.
        layers: by full name, as they are put in; none for the base.
        steps: what advances its rows; on a GPU they are compiled with these very layers.
    """

    hash: str | None
    layers: dict[str, Any]
    steps: Steps


@dataclass(frozen=True)
class _Found:
    """What an arm's name meant when the files had this stamp."""

    stamp: Stamp
    folder: Path
    version: str | None
    hash: str

    @property
    def key(self) -> tuple[Path, str]:
        """What an arm in memory is found by."""
        return self.folder, self.hash


@dataclass(frozen=True)
class _Refused:
    stamp: Stamp
    at: float
    sentence: str


class Arms:
    """The arms of one base.

    Args:
        base: without an adapter in it; from now on only this object puts any in.
        pixels: fingerprint of the pixel pipeline.
        probe: what adapters prove themselves with.
        folders: adapter directories that may answer.
        root, name: the registry and the name in it; None where there is none.
        most: adapters kept in memory. One that is under way lives on until its last ask is
            answered.
        merge_bytes: see ``answering.for_answering``, for each adapter.
    """

    def __init__(
        self,
        base: Base,
        probe: ProbeInputs,
        *,
        folders: Sequence[str] = (),
        root: Path | None = None,
        name: str | None = None,
        most: int = 8,
        merge_bytes: int = 0,
    ) -> None:
        self.base = base
        self.probe = probe
        self.root, self.name, self.most = root, name, most
        self.merge_bytes = merge_bytes
        self._folders = {folder: Path(folder).absolute() for folder in folders if folder != BASE}
        base.model.eval()
        self._base = Arm(None, {}, Steps(base.backbone, own_kernels=False))
        self._inside = self._base
        self._kept: OrderedDict[tuple[Path, str], Arm] = OrderedDict()
        self._found: dict[str, _Found] = {}
        self._refused: dict[str, _Refused] = {}

    def take(self, name: str) -> tuple[Identity, Arm]:
        """The arm that a name means now, loaded and proved.

        Args:
            name: ``base``, a channel or version of the registry, or one of ``folders``.

        Raises:
            AdapterError: it means nothing, or what it means is not as it was registered, cannot be
                loaded or does not prove itself.
        """
        if name == BASE:
            return self._identify(name, None, None), self._base
        stamp = self._stamp(name)
        refused = self._refused.get(name)
        if refused and refused.stamp == stamp and time.monotonic() - refused.at < FAILURE_KEPT:
            raise AdapterError(refused.sentence)
        try:
            found = self._found.get(name)
            if found is None or found.stamp != stamp:
                found = self._look_up(name, stamp)
            arm = self._kept.get(found.key)
            if arm is None:
                arm = self._load(found)
        except MondrianError as error:
            self._found.pop(name, None)
            sentence = f"The arm {name} cannot answer: {error}"
            self._refused[name] = _Refused(stamp, time.monotonic(), sentence)
            raise AdapterError(sentence) from error
        self._refused.pop(name, None)
        self._found[name] = found
        self._kept.move_to_end(found.key)
        return self._identify(name, found.version, found.hash), arm

    def put_in(self, arm: Arm) -> None:
        """Let the model be this arm."""
        if arm is not self._inside:
            lora.take_out(self.base.model)
            lora.put_in(self.base.model, arm.layers)
            self._inside = arm

    def identities(self) -> tuple[Identity, ...]:
        """Of the base and of every name whose adapter is in memory, as it was last looked up."""
        known = [self._identify(BASE, None, None)]
        for name, found in tuple(self._found.items()):
            if found.key in self._kept:
                known.append(self._identify(name, found.version, found.hash))
        return tuple(known)

    def _identify(self, name: str, version: str | None, digest: str | None) -> Identity:
        about = self.base.identity
        return Identity(name, version, digest, about.name, about.weights, self.probe.pixels)

    def _stamp(self, name: str) -> Stamp:
        """Times and sizes of the files that say what a name means: cheap, and enough to tell."""
        if name in self._folders:
            folder = self._folders[name]
            return tuple(
                _stamp_of(folder / one)
                for one in (adapters.MANIFEST, adapters.CONFIG, adapters.WEIGHTS)
            )
        if self.root is None or self.name is None:
            return ()
        return (_stamp_of(self.root / self.name / "history.jsonl"),)

    def _look_up(self, name: str, stamp: Stamp) -> _Found:
        if name in self._folders:
            folder, version = self._folders[name], None
        elif self.root is None or self.name is None:
            known = ", ".join([BASE, *self._folders])
            raise AdapterError(f"there is no registry, and it is none of {known}")
        elif "/" in name or "\\" in name:
            raise AdapterError(
                "it is no version or channel, and adapter directories answer only if the service "
                "was started with them"
            )
        else:
            folder = registry.resolve(self.root, self.name, name)
            version = folder.name
        return _Found(stamp, folder, version, adapters.read(folder).hash)

    def _load(self, found: _Found) -> Arm:
        """Load an adapter with its proof; the model is its base afterwards."""
        self.put_in(self._base)
        adapter = adapters.load(found.folder, self.base, probe=self.probe)
        layers = answering.for_answering(
            lora.take_out(self.base.model), merge_bytes=self.merge_bytes
        )
        lora.put_in(self.base.model, layers)
        try:
            # What answers is what is proved, so once more in this form.
            adapters.prove(adapter, self.base, self.probe)
        finally:
            lora.take_out(self.base.model)
        if adapter.hash != found.hash:
            raise AdapterError(f"{found.folder} was changed while it was read; ask again")
        arm = Arm(adapter.hash, layers, Steps(self.base.backbone, own_kernels=False))
        self._kept[found.key] = arm
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return arm


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
