"""Base and tuned model on the same photographs, with the same prompt and the same pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.batches import Example
from ..data.prompt import fingerprint
from ..errors import AdapterError, DataError
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
from .answers import AnswerStore, Question
from .comparison import SHUFFLED
from .constrain import Constraint
from .generate import Request, generate_each
from .outputs import Output

CONSTRAINED = "_constrained"
"""Ends the name of an arm's second answers, those under the schema."""
MARGIN = 1.25
"""An answer may be this much longer than the longest reference before it is cut."""


class Evaluator:
    """Answers held-out photographs with every arm, on one copy of the base.

    A question (picture and prompt) is asked once: arms that put the same ones to the same model,
    such as the tuned one and its shuffled control where all rows share a prompt, share the answers.

    Args:
        base: with or without LoRA layers in it; without them only ``base`` can be asked.
        features: each photograph through the tower once.
        max_tokens: most tokens of an answer; None for the longest reference and a margin.
        batch_size: photographs answered at once.
        temperature: 0 for greedy decoding.
        constraint: answer with every arm twice, free and under this schema; None for free only.
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
        self.reused: dict[str, int] = {}
        """By arm, how many answers of the last `run` had been given before."""
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
        worse on it. With a constraint comes ``<arm>_constrained`` for each arm asked for: the same
        model and prompts, read once for both, so what differs is the constraint's doing.

        Raises:
            DataError: there are no examples, or an arm is unknown.
            AdapterError: ``tuned`` is asked of a model without an adapter.
        """
        if not examples:
            raise DataError("there are no held-out photographs to evaluate")
        for arm in arms:
            if arm not in ("base", "tuned"):
                raise DataError(f"there is no arm {arm} to evaluate; use base or tuned")
        if "tuned" in arms and not lora.lora_layers(self.base.model):
            raise AdapterError("the arm tuned needs an adapter, and the model has none; load one")
        limit = self.max_tokens or self.limit(examples)
        outputs: dict[str, list[Output]] = {}
        wanted = list(arms)
        if "tuned" in wanted and len({example.row.image_sha256 for example in examples}) > 1:
            wanted.append(SHUFFLED)
        self.reused, self.damaged = {}, 0
        self.base.model.eval()
        stores: dict[str, AnswerStore] = {}
        for arm in wanted:
            shown = list(examples)
            if arm == SHUFFLED:
                shown = [_other(examples, at) for at in range(len(examples))]
            model = "base" if arm == "base" else "tuned"
            names: dict[str, tuple[Constraint | None, AnswerStore]] = {}
            for name, constraint in ((arm, None), (arm + CONSTRAINED, self.constraint)):
                if name == arm or (constraint is not None and arm != SHUFFLED):
                    key = model + name.removeprefix(arm)
                    if key not in stores:
                        stores[key] = self._store(model, limit, constraint)
                    names[name] = (constraint, stores[key])

            def tell(done: int, arm: str = arm) -> None:
                progress(arm, done)

            def decode(
                names: Mapping[str, Any] = names,
                shown: Sequence[Example] = shown,
                tell: Callable[[int], None] = tell,
            ) -> dict[str, list[Output]]:
                return self._answers(examples, shown, names, limit, tell)

            if arm == "base":
                with lora.without_adapter(self.base.model):
                    outputs |= decode()
            else:
                outputs |= decode()
        self.damaged = sum(store.damaged for store in stores.values())
        self.problem = next((store.problem for store in stores.values() if store.problem), "")
        return outputs

    def _store(self, model: str, limit: int, constraint: Constraint | None) -> AnswerStore:
        """Answers of one model under one set of settings."""
        identity = self.identity | ({"adapter": None} if model == "base" else {})
        settings = {
            "max_tokens": limit,
            "batch_size": self.batch_size,
            "schema": constraint.fingerprint if constraint else None,
        }
        return AnswerStore(self.cache, {"model": model, **identity}, settings)

    def _answers(
        self,
        examples: Sequence[Example],
        shown: Sequence[Example],
        names: Mapping[str, tuple[Constraint | None, AnswerStore]],
        limit: int,
        progress: Callable[[int], None],
    ) -> dict[str, list[Output]]:
        """The answers of an arm, free and constrained; what is not known yet is asked."""
        asked = [
            Question(picture.row.image_sha256, fingerprint(example.row.prompt))
            for example, picture in zip(examples, shown, strict=True)
        ]
        stores = [store for _, store in names.values()]
        for name, (_, store) in names.items():
            self.reused[name] = sum(store.get(question) is not None for question in asked)
        # By question, the first row that asks it; of several stores, all are asked together.
        new = {
            question: at
            for at, question in reversed(list(enumerate(asked)))
            if any(store.get(question) is None for store in stores)
        }
        places = sorted(new.values())
        known = len(examples) - sum(asked[at] in new for at in range(len(examples)))
        if known:
            progress(known)
        if places:
            generate_each(
                self.base,
                self._requests([examples[at] for at in places], [shown[at] for at in places]),
                [constraint for constraint, _ in names.values()],
                max_tokens=limit,
                batch_size=self.batch_size,
                temperature=self.temperature,
                seed=self.seed,
                # Rows that ask the same are answered with the last of them.
                progress=lambda done: progress(
                    known + done if done < len(places) else len(examples)
                ),
                answered=lambda request, number, output: stores[number].put(
                    asked[places[request]], output
                ),
            )
        return {
            name: [_given(store, question) for question in asked]
            for name, (_, store) in names.items()
        }

    @staticmethod
    def limit(examples: Sequence[Example]) -> int:
        """Most tokens of an answer: the longest reference and a quarter more."""
        return int(max(example.supervised for example in examples) * MARGIN) + 1

    def _requests(self, examples: Sequence[Example], shown: Sequence[Example]) -> list[Request]:
        """The prompts of ``examples``, each with the picture of the same place in ``shown``."""
        pictures = self.features.get([(one.row.image_sha256, one.pixels) for one in shown])
        return [
            Request(
                self.base.prompt_tokens(example.row.prompt, picture.pixels.tokens),
                features,
                picture.pixels.grid,
            )
            for example, picture, features in zip(examples, shown, pictures, strict=True)
        ]


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
