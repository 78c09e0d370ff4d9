"""Who answers: one base, and adapters that are put into it and taken out again between steps.

Rows of one arm are answered with its own form, which costs what the base does where the adapter's
matrices are small. Rows of several arms are answered in one batch, with a mixture: the base's
layers, and beside them each row's own adapter. Each adapter has proved itself in either form before
it answers in it.

An arm's name is looked up when an ask is taken up, so that a channel that was moved is followed at
once. What cannot be loaded and proved is refused with its reason; no other model answers instead.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
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

RECENT = 60.0
"""Seconds for which an adapter that was asked for stays in the mixture, so that adapters which are
asked for in turn do not each make another one; a mixture costs more the more adapters it has."""

Stamp = tuple[tuple[int, int] | None, ...]


@dataclass(eq=False)
class Arm:
    """A model that can answer: the base, or the base with an adapter's layers.

    Compared by identity: another directory of the same weights is another arm, because it has to
    prove itself.

    Attributes:
        adapter: None for the base.
        learned: mlx-vlm's layers by full name, which a mixture is made of; none for the base.
        layers: by full name, as they are put in; none for the base.
        steps: what advances its rows; on a GPU they are compiled with these very layers.
        used: when it was last asked for, of the monotonic clock.
    """

    adapter: adapters.Adapter | None
    learned: dict[str, Any]
    layers: dict[str, Any]
    steps: Steps
    used: float = 0.0


@dataclass(frozen=True, eq=False)
class Mixture:
    """The base with several adapters beside it, each for its own rows.

    Attributes:
        arms: the adapters, by their numbers; rows of the base have the number after the last.
        rows: where it is said whose the rows are.
        layers, steps: as an arm's.
    """

    arms: tuple[Arm, ...]
    rows: answering.Rows
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
            answered, and one that is in the mixture until there is another mixture.
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
        self._base = Arm(None, {}, {}, Steps(base.backbone, own_kernels=False))
        self._inside: Arm | Mixture = self._base
        self._mixture: Mixture | None = None
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
        except (MondrianError, OSError) as error:
            self._found.pop(name, None)
            sentence = f"The arm {name} cannot answer: {error}"
            self._refused[name] = _Refused(stamp, time.monotonic(), sentence)
            raise AdapterError(sentence) from error
        self._refused.pop(name, None)
        self._found[name] = found
        self._kept.move_to_end(found.key)
        arm.used = time.monotonic()
        return self._identify(name, found.version, found.hash), arm

    def mix(self, arms: Iterable[Arm]) -> None:
        """See to it that these arms can answer rows of one batch.

        Raises:
            AdapterError: one does not prove itself beside the others.
        """
        distinct = dict.fromkeys(arms)
        needed = [arm for arm in distinct if arm is not self._base]
        old = self._mixture.arms if self._mixture else ()
        if len(distinct) < 2 or all(arm in old for arm in needed):
            return
        since = time.monotonic() - RECENT
        kept = tuple(self._kept.values())
        chosen = [arm for arm in old if arm in needed or (arm in kept and arm.used > since)]
        self._mixture = self._mixed((*chosen, *(arm for arm in needed if arm not in chosen)))

    def put_in_rows(self, rows: Sequence[Arm | None]) -> Steps:
        """Let the model be each row's arm; None where a row is nobody's.

        Every two arms among them have to be mixed already.

        Returns:
            What advances such a batch.
        """
        among = {arm for arm in rows if arm is not None}
        if len(among) == 1:
            (arm,) = among
            self.put_in(arm)
            return arm.steps
        mixture = self._mixture
        assert mixture is not None, "no mixture was made"
        number = {arm: place for place, arm in enumerate(mixture.arms)}
        number[self._base] = len(mixture.arms)
        mixture.rows.put([number[self._base if arm is None else arm] for arm in rows])
        self.put_in(mixture)
        return mixture.steps

    def put_in(self, arm: Arm | Mixture) -> None:
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
        learned = lora.take_out(self.base.model)
        layers = answering.for_answering(learned, merge_bytes=self.merge_bytes)
        lora.put_in(self.base.model, layers)
        try:
            # What answers is what is proved, so once more in this form.
            adapters.prove(adapter, self.base, self.probe)
        finally:
            lora.take_out(self.base.model)
        if adapter.hash != found.hash:
            raise AdapterError(f"{found.folder} was changed while it was read; ask again")
        arm = Arm(adapter, learned, layers, Steps(self.base.backbone, own_kernels=False))
        self._kept[found.key] = arm
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return arm

    def _mixed(self, arms: tuple[Arm, ...]) -> Mixture:
        """A mixture in which each adapter has proved itself; the model is its base afterwards."""
        self.put_in(self._base)
        rows = answering.Rows(len(arms))
        # A prompt is read by its own arm, with its own tower; steps see no pictures.
        layers = answering.mix([_without_tower(arm.learned) for arm in arms], rows)
        for number, arm in enumerate(arms):
            assert arm.adapter is not None
            rows.put([number])
            tower = {name: one for name, one in arm.layers.items() if lora.in_tower(name)}
            lora.put_in(self.base.model, layers | tower)
            try:
                adapters.prove(arm.adapter, self.base, self.probe)
            finally:
                lora.take_out(self.base.model)
        steps = Steps(self.base.backbone, own_kernels=False, changing=rows.arrays)
        return Mixture(arms, rows, layers, steps)


def _without_tower(layers: dict[str, Any]) -> dict[str, Any]:
    return {name: layer for name, layer in layers.items() if not lora.in_tower(name)}


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
