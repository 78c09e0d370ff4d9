"""The arms a config names, beside base and tuned: who answers, and under what conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import registry
from ..data.critique import Critique
from ..data.prompt import fingerprint, with_examples
from ..data.rows import Row
from ..errors import DataError, MondrianError
from ..evaluation import evidence, metrics
from ..evaluation.comparison import CONSTRAINED
from ..evaluation.constrain import Constraint, Lengths
from ..evaluation.evaluator import Voice
from ..model import adapter as adapters
from ..model import lora
from ..model.adapter import Adapter
from ..model.base import Base
from ..model.probe import ProbeInputs
from .versioning import occupant, registry_name

if TYPE_CHECKING:
    from ..config import Config

PRODUCTION = "production"
EXAMPLES = "base_examples"


@dataclass
class Arms:
    """What can be asked, and what cannot.

    Attributes:
        names: arms to ask, in the config's order, each free one before its constrained one.
        voices: those of them that are neither base nor tuned.
        constraint: the schema of the constrained ones, if there are any.
        failed: the reason of each arm that cannot be asked.
        notes: what was left out that nobody had asked for by name, as sentences.
    """

    names: list[str]
    voices: dict[str, Voice] = field(default_factory=dict)
    constraint: Constraint | None = None
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find(
    config: Config,
    base: Base,
    *,
    adapter: Adapter | None,
    rows: Sequence[Row],
    train: Sequence[Row],
    probe: ProbeInputs,
    failed: dict[str, str],
    alone: bool = False,
) -> Arms:
    """The arms of ``eval.arms`` and ``eval.constrained``.

    Args:
        adapter: the tuned model's, which is in ``base``; without one the tuned arms are left out.
        rows: what will be asked about; no adapter may have been trained on them.
        train: where examples, lengths and the names of dimensions come from.
        probe: what an adapter that is loaded has to prove itself with.
        failed: reasons why arms could not be made before this.
        alone: leave ``eval.against`` out unless ``eval.arms`` names production.
    """
    wanted = [str(arm) for arm in config.eval.arms]
    if config.eval.constrained:
        free = [arm for arm in wanted if not arm.endswith(CONSTRAINED)]
        wanted = [each for arm in free for each in (arm, arm + CONSTRAINED)]
    arms = Arms([], failed={})
    unasked: Voice | None = None
    if adapter is not None and "tuned" in wanted and PRODUCTION not in wanted and not alone:
        unasked = _unasked(config, base, adapter, rows, probe, arms)
        wanted += [PRODUCTION] if unasked else []
    for arm in wanted:
        name = arm.removesuffix(CONSTRAINED)
        if name in failed:
            arms.failed[arm] = failed[name]
        elif name != "tuned" or adapter is not None:
            arms.names.append(arm)
    makers: dict[str, Callable[[], Voice]] = {
        PRODUCTION: lambda: unasked or _production(config, base, rows, probe),
        EXAMPLES: lambda: _with_examples(base, train, config.eval.examples),
    }
    for name, make in makers.items():
        mine = [arm for arm in arms.names if arm.removesuffix(CONSTRAINED) == name]
        try:
            if mine:
                arms.voices[name] = make()
        except MondrianError as error:
            _leave_out(arms, mine, error)
    bound = [arm for arm in arms.names if arm.endswith(CONSTRAINED)]
    try:
        if bound:
            arms.constraint = critique_constraint(base, train)
    except MondrianError as error:
        _leave_out(arms, bound, error)
    return arms


def check_unseen(adapter: Adapter, rows: Sequence[Row]) -> None:
    """Refuse to judge an adapter on photographs it was trained on."""
    seen = set(adapter.manifest.get("trained_on", []))
    known = [row for row in rows if row.image_sha256 in seen]
    if known:
        raise DataError(
            f"{len(known)} of {len(rows)} photographs to evaluate were trained on by "
            f"{adapter.folder.name}, {known[0].image_path.name} first; evaluate on the split it "
            "was trained with (data.output_dir), or on other photographs"
        )


def untrained_prompts(adapter: Adapter, rows: Sequence[Row]) -> str | None:
    """A warning if an adapter is asked in none of the words that it was trained on.

    Where every row was trained with a prompt of its own, a held-out one's is always new, and None
    is returned.
    """
    trained = set(adapter.manifest.get("prompts", []))
    if not trained or len(trained) >= int(adapter.manifest.get("training", {}).get("rows", 0)):
        return None
    asked = {fingerprint(row.prompt) for row in rows}
    if asked & trained:
        return None
    return (
        f"{adapter.folder.name} was trained on {len(trained)} prompt(s), and none of the "
        f"{len(rows)} held-out rows is asked with one of them; use the database's prompts of then "
        "(data.output_dir of its run), or train it on these"
    )


def critique_constraint(base: Base, train: Sequence[Row]) -> Constraint:
    """The schema of critiques like the training rows'.

    Raises:
        DataError: there is none of which all training critiques would be examples.
    """
    taught = [metrics.read(row.response) for row in train]
    names = evidence.agreed_dimensions(taught)
    if not names:
        raise DataError(
            "the training critiques do not agree on their dimensions, so there is no one schema to "
            "answer under; bring them together with data.dimension_map"
        )
    critiques = [reading.critique for reading in taught if reading.critique]
    return Constraint.critique(
        base, names, decimals=_has_decimals(critiques), lengths=Lengths.of(critiques)
    )


def _has_decimals(critiques: Sequence[Critique]) -> bool:
    return any(one.score % 1 for critique in critiques for one in critique.dimensions)


def _leave_out(arms: Arms, names: Sequence[str], error: MondrianError) -> None:
    arms.failed |= {arm: str(error) for arm in names}
    arms.names = [arm for arm in arms.names if arm not in names]


def _production(config: Config, base: Base, rows: Sequence[Row], probe: ProbeInputs) -> Voice:
    root, name = Path(config.registry.root), registry_name(config)
    adapter = adapters.read(registry.resolve(root, name, config.eval.against or PRODUCTION))
    check_unseen(adapter, rows)
    return Voice(lambda: adapters.applied(adapter.folder, base, probe=probe), adapter.hash)


def _unasked(
    config: Config,
    base: Base,
    adapter: Adapter,
    rows: Sequence[Row],
    probe: ProbeInputs,
    arms: Arms,
) -> Voice | None:
    """What ``eval.against`` means, where that is another adapter that can be asked.

    Nobody named it, so one that cannot be asked is a note and no failure.
    """
    ref = config.eval.against
    place = occupant(config, ref) if ref is not None else None
    if place is None or place[1] == adapter.hash:
        return None
    told = f"{ref} ({place[0]})" if ref != place[0] else place[0]
    try:
        voice = _production(config, base, rows, probe)
        with voice.enter():
            pass  # another base or other pixels are found out here
    except MondrianError as error:
        arms.notes.append(f"{told} is not compared with: {error}")
        return None
    return voice


def _with_examples(base: Base, train: Sequence[Row], number: int) -> Voice:
    """The base, shown critiques that are spread over the range of overall scores.

    From the rows that were asked with the same prompt where there are enough, since another
    advisor's critiques would be examples of something else.
    """
    if len(train) < number:
        raise DataError(f"there are {len(train)} training rows, too few for {number} examples")

    def score(row: Row) -> tuple[float, str]:
        overall = metrics.read(row.response).overall
        return (-1.0 if overall is None else overall, row.job_id)

    ordered = sorted(train, key=score)

    def asked(prompt: str) -> str:
        own = [row for row in ordered if row.prompt == prompt]
        among = own if len(own) >= number else ordered
        places = [(2 * place + 1) * len(among) // (2 * number) for place in range(number)]
        return with_examples(prompt, [among[place].response for place in places])

    return Voice(lambda: lora.without_adapter(base.model), None, asked)
