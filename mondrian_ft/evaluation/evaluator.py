"""Base and tuned model on the same photographs, with the same prompt and the same pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..data.batches import Example
from ..errors import AdapterError, DataError
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
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

    Args:
        base: with or without LoRA layers in it; without them only ``base`` can be asked.
        features: each photograph through the tower once.
        max_tokens: most tokens of an answer; None for the longest reference and a margin.
        batch_size: photographs answered at once.
        temperature: 0 for greedy decoding.
        constraint: answer with every arm twice, free and under this schema; None for free only.
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
    ) -> None:
        self.base = base
        self.features = features
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed
        self.constraint = constraint

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
        self.base.model.eval()
        for arm in wanted:
            shown = [_other(examples, at) for at in range(len(examples))]
            requests = self._requests(examples, shown if arm == SHUFFLED else examples)

            def tell(done: int, arm: str = arm) -> None:
                progress(arm, done)

            names = [arm]
            constraints: list[Constraint | None] = [None]
            if self.constraint is not None and arm != SHUFFLED:
                names.append(arm + CONSTRAINED)
                constraints.append(self.constraint)

            def decode(requests=requests, constraints=constraints, tell=tell) -> list[list[Output]]:
                return generate_each(
                    self.base,
                    requests,
                    constraints,
                    max_tokens=limit,
                    batch_size=self.batch_size,
                    temperature=self.temperature,
                    seed=self.seed,
                    progress=tell,
                )

            if arm == "base":
                with lora.without_adapter(self.base.model):
                    answers = decode()
            else:
                answers = decode()
            outputs |= dict(zip(names, answers, strict=True))
        return outputs

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


def _other(examples: Sequence[Example], at: int) -> Example:
    """The next example that shows another photograph; the same one if there is none.

    Not simply the next: a photograph that two advisors judged may come twice in a row.
    """
    own = examples[at].row.image_sha256
    following = [*examples[at + 1 :], *examples[:at]]
    return next((one for one in following if one.row.image_sha256 != own), examples[at])
