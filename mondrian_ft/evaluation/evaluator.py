"""Base and tuned model on the same photographs, with the same prompt and the same pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..data.batches import Example
from ..errors import DataError
from ..model import lora
from ..model.base import Base
from ..model.features import FeatureStore
from .comparison import SHUFFLED
from .generate import Request, generate
from .outputs import Output

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
    ) -> None:
        self.base = base
        self.features = features
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed

    def run(
        self,
        examples: Sequence[Example],
        arms: Sequence[str],
        progress: Callable[[str, int], None] = lambda arm, done: None,
    ) -> dict[str, list[Output]]:
        """Outputs of each arm, one per example.

        With the arm ``tuned`` comes ``tuned_shuffled``: the same prompts, each with another
        example's photograph. A model that looks at the photographs does worse on it.

        Raises:
            DataError: there are no examples.
        """
        if not examples:
            raise DataError("there are no held-out photographs to evaluate")
        limit = self.max_tokens or self.limit(examples)
        outputs: dict[str, list[Output]] = {}
        wanted = list(arms)
        if "tuned" in wanted and len(examples) > 1:
            wanted.append(SHUFFLED)
        self.base.model.eval()
        for arm in wanted:
            requests = self._requests(examples, 1 if arm == SHUFFLED else 0)

            def tell(done: int, arm: str = arm) -> None:
                progress(arm, done)

            def decode(requests=requests, tell=tell) -> list[Output]:
                return generate(
                    self.base,
                    requests,
                    max_tokens=limit,
                    batch_size=self.batch_size,
                    temperature=self.temperature,
                    seed=self.seed,
                    progress=tell,
                )

            if arm == "base":
                with lora.without_adapter(self.base.model):
                    outputs[arm] = decode()
            else:
                outputs[arm] = decode()
        return outputs

    @staticmethod
    def limit(examples: Sequence[Example]) -> int:
        """Most tokens of an answer: the longest reference and a quarter more."""
        return int(max(example.supervised for example in examples) * MARGIN) + 1

    def _requests(self, examples: Sequence[Example], shift: int) -> list[Request]:
        """Prompts with pictures; ``shift`` gives each prompt the picture that many rows on."""
        shown = [examples[(at + shift) % len(examples)] for at in range(len(examples))]
        pictures = self.features.get([(one.row.image_sha256, one.pixels) for one in shown])
        return [
            Request(
                self.base.prompt_tokens(example.row.prompt, picture.pixels.tokens),
                features,
                picture.pixels.grid,
            )
            for example, picture, features in zip(examples, shown, pictures, strict=True)
        ]
