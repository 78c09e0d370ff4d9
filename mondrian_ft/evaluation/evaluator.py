"""Several models on the same photographs with the same pixels, on one copy of the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.batches import Example
from ..data.prompt import fingerprint
from ..errors import AdapterError, DataError, ModelError
from ..model import lora
from ..model.backend import mx
from ..model.base import Base
from ..model.features import FeatureStore
from .answers import AnswerStore, Question
from .comparison import CONSTRAINED, SHUFFLED
from .constrain import Constraint
from .generate import Request, generate_each
from .outputs import Output

MARGIN = 1.25
"""An answer may be this much longer than the longest reference before it is cut."""


@dataclass(frozen=True)
class Voice:
    """A model that can be asked, and how.

    Attributes:
        enter: puts the model into this state for as long as its block lasts; what it raises is
            the reason why the voice cannot be heard.
        adapter: hash of the adapter that is in effect then; None for the base.
        prompt: what is asked, from a row's prompt.
    """

    enter: Callable[[], AbstractContextManager[Any]]
    adapter: str | None
    prompt: Callable[[str], str] = str


class Evaluator:
    """Answers held-out photographs with every arm, on one copy of the base.

    A question (picture and prompt) is asked once: arms that put the same ones to the same model,
    such as the tuned one and its shuffled control where all rows share a prompt, share the answers.

    Args:
        base: with or without LoRA layers in it; without them there is no arm ``tuned``.
        features: each photograph through the tower once.
        max_tokens: most tokens of an answer; None for the longest reference and a margin.
        batch_size: photographs answered at once.
        temperature: 0 for greedy decoding.
        constraint: the schema that arms ending in ``_constrained`` answer under.
        voices: arms besides ``base`` and ``tuned``, by name.
        cache: folder in which greedy answers are kept for the next time, under ``identity`` and the
            settings of decoding; None keeps none.
        identity: what tells this model's answers from another's: base, ``adapter`` (its hash),
            pixels, versions.
    """

    def __init__(
        self,
        base: Base,
        features: FeatureStore,
        *,
        max_tokens: int | None = None,
        batch_size: int = 16,
        temperature: float = 0.0,
        seed: int = 0,
        constraint: Constraint | None = None,
        voices: Mapping[str, Voice] | None = None,
        cache: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.base = base
        self.features = features
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed
        self.constraint = constraint
        # Answers that were drawn are not the model's only ones.
        self.cache = cache if temperature == 0 else None
        self.identity = dict(identity or {})
        self.voices = {
            "base": Voice(lambda: lora.without_adapter(base.model), None),
            "tuned": Voice(nullcontext, self.identity.get("adapter") or "without a hash"),
            **(voices or {}),
        }
        self.reused: dict[str, int] = {}
        """By arm, how many answers of the last `run` had been given before."""
        self.failed: dict[str, str] = {}
        """By arm of the last `run` that could not answer, why."""
        self.peak_memory: dict[str, float] = {}
        """By arm of the last `run` that was asked anything, the most memory in GB (10⁹ bytes)."""
        self.damaged = 0
        """Lines of the cache that could not be read in the last `run`."""
        self.problem = ""
        """Why answers of the last `run` could not be kept, if so."""

    def run(
        self,
        examples: Sequence[Example],
        arms: Sequence[str],
        progress: Callable[[str, int], None] = lambda arm, done: None,
    ) -> dict[str, list[Output]]:
        """Outputs of each arm, one per example.

        With the arm ``tuned`` comes ``tuned_shuffled``, if there are two different photographs:
        the same prompts, each with another photograph. A model that looks at the photographs does
        worse on it. ``<arm>_constrained`` is an arm under the schema; where the arm is asked for as
        well, the prompts are read once for both, so what differs is the constraint's doing.

        An arm whose model does not load, or gives no sound logits, is left out and ``failed`` says
        why; the others are answered all the same.

        Raises:
            DataError: there are no examples, or an arm is unknown.
            AdapterError: ``tuned`` is asked of a model without an adapter.
            ModelError: no arm could answer; the first one's reason.
        """
        if not examples:
            raise DataError("there are no held-out photographs to evaluate")
        for arm in arms:
            if arm.removesuffix(CONSTRAINED) not in self.voices:
                known = ", ".join(self.voices)
                raise DataError(f"there is no arm {arm} to evaluate; there is {known}")
            if arm.endswith(CONSTRAINED) and self.constraint is None:
                raise DataError(f"the arm {arm} needs the schema that answers shall keep to")
        names = list(dict.fromkeys(arm.removesuffix(CONSTRAINED) for arm in arms))
        if "tuned" in names and not lora.lora_layers(self.base.model):
            raise AdapterError("the arm tuned needs an adapter, and the model has none; load one")
        self.reused, self.damaged, self.failed, self.peak_memory = {}, 0, {}, {}
        self.base.model.eval()
        limit = self.max_tokens or self.limit(examples)
        stores: dict[tuple[str | None, bool], AnswerStore] = {}
        outputs: dict[str, list[Output]] = {}
        others = len({example.row.image_sha256 for example in examples}) > 1
        for name in names:
            voice = self.voices[name]
            asked = [_asked(example, voice) for example in examples]
            wanted = [arm for arm in (name, name + CONSTRAINED) if arm in arms]
            rounds = [(wanted, list(examples))]
            if name == "tuned" and "tuned" in arms and others:
                rounds.append(([SHUFFLED], [_other(examples, at) for at in range(len(examples))]))
            try:
                with voice.enter():
                    for each, shown in rounds:
                        outputs |= self._answers(asked, shown, each, voice, limit, stores, progress)
            except (AdapterError, ModelError) as error:
                self.failed |= {arm: str(error) for arm in wanted}
                for arm in (*wanted, SHUFFLED):
                    if arm != SHUFFLED or name == "tuned":
                        outputs.pop(arm, None)
                if len(self.failed) == len(set(arms)):
                    raise
        self.damaged = sum(store.damaged for store in stores.values())
        self.problem = next((store.problem for store in stores.values() if store.problem), "")
        return outputs

    def voice(self, arm: str) -> Voice:
        """Whose answers an arm's are."""
        if arm == SHUFFLED:
            return self.voices["tuned"]
        return self.voices[arm.removesuffix(CONSTRAINED)]

    def _store(self, adapter: str | None, limit: int, constraint: Constraint | None) -> AnswerStore:
        """Answers of one model under one set of settings."""
        model = "base" if adapter is None else "tuned"
        settings = {
            "max_tokens": limit,
            "batch_size": self.batch_size,
            "schema": constraint.fingerprint if constraint else None,
        }
        identity = self.identity | {"adapter": adapter}
        return AnswerStore(self.cache, {"model": model, **identity}, settings)

    def _answers(
        self,
        examples: Sequence[Example],
        shown: Sequence[Example],
        arms: Sequence[str],
        voice: Voice,
        limit: int,
        stores: dict[tuple[str | None, bool], AnswerStore],
        progress: Callable[[str, int], None],
    ) -> dict[str, list[Output]]:
        """The answers of a voice's arms, free and constrained; what is not known yet is asked."""
        constraints = [self.constraint if arm.endswith(CONSTRAINED) else None for arm in arms]
        own: list[AnswerStore] = []
        for constraint in constraints:
            key = (voice.adapter, constraint is not None)
            if key not in stores:
                stores[key] = self._store(voice.adapter, limit, constraint)
            own.append(stores[key])
        asked = [
            Question(picture.row.image_sha256, fingerprint(example.row.prompt))
            for example, picture in zip(examples, shown, strict=True)
        ]
        for arm, store in zip(arms, own, strict=True):
            self.reused[arm] = sum(store.get(question) is not None for question in asked)
        # By question, the first row that asks it; of several stores, all are asked together.
        new = {
            question: at
            for at, question in reversed(list(enumerate(asked)))
            if any(store.get(question) is None for store in own)
        }
        places = sorted(new.values())
        known = len(examples) - sum(asked[at] in new for at in range(len(examples)))
        if known:
            progress(arms[0], known)
        if places:
            mx.reset_peak_memory()
            generate_each(
                self.base,
                self._requests([examples[at] for at in places], [shown[at] for at in places]),
                constraints,
                max_tokens=limit,
                batch_size=self.batch_size,
                temperature=self.temperature,
                seed=self.seed,
                # Rows that ask the same are answered with the last of them.
                progress=lambda done: progress(
                    arms[0], known + done if done < len(places) else len(examples)
                ),
                answered=lambda request, number, output: own[number].put(
                    asked[places[request]], output
                ),
            )
            peak = mx.get_peak_memory() / 1e9
            self.peak_memory |= dict.fromkeys(arms, peak)
        return {
            arm: [_given(store, question) for question in asked]
            for arm, store in zip(arms, own, strict=True)
        }

    @staticmethod
    def limit(examples: Sequence[Example]) -> int:
        """Most tokens of an answer: the longest reference and a quarter more."""
        return int(max(example.supervised for example in examples) * MARGIN) + 1

    def _requests(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[Request]:
        """The prompts of ``examples``, each with the picture of the same place in ``shown``.

        Raises:
            ModelError: prompt and answer together are more than the model can hold.
        """
        pictures = self.features.get([(one.row.image_sha256, one.pixels) for one in shown])
        found = [
            Request(
                self.base.prompt_tokens(example.row.prompt, picture.pixels.tokens),
                features,
                picture.pixels.grid,
            )
            for example, picture, features in zip(examples, shown, pictures, strict=True)
        ]
        longest = max(len(request.tokens) for request in found)
        if longest >= self.base.backbone.longest:
            raise ModelError(
                f"a prompt of {longest} tokens leaves no room for an answer, as the model can hold "
                f"{self.base.backbone.longest}; give fewer examples, or lower data.max_pixels"
            )
        return found


def _asked(example: Example, voice: Voice) -> Example:
    """The example with the prompt that this voice is given."""
    return replace(example, row=replace(example.row, prompt=voice.prompt(example.row.prompt)))


def _given(store: AnswerStore, question: Question) -> Output:
    found = store.get(question)
    assert found is not None
    return found


def _other(examples: Sequence[Example], at: int) -> Example:
    """The next example that shows another photograph; the same one if there is none.

    Not simply the next: a photograph that two advisors judged may come twice in a row.
    """
    own = examples[at].row.image_sha256
    following = [*examples[at + 1 :], *examples[:at]]
    return next((one for one in following if one.row.image_sha256 != own), examples[at])
