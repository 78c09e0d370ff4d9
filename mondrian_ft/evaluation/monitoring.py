"""A few validation rows answered while training goes on, for one figure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..data.batches import Example
from ..model.base import Base
from ..model.features import FeatureStore
from . import evidence, metrics
from .evaluator import Evaluator
from .generate import Request, generate

FORMAT, SCORES = "format_compliance", "score_mae"


class AnswerMonitor:
    """Answers the same rows each time it is called, greedily and free, and measures the answers.

    It draws no random number and changes no weight, so training goes on as if nobody had asked.

    Args:
        base: the model, with the adapter in it.
        features: each photograph through the tower once.
        examples: validation rows; ``rows`` of them are asked, spread evenly over all.
        name: ``format_compliance``, the share of answers, 0-1, that keep the format to the letter;
            or ``score_mae``, the mean error, 0-10, of the scores in the answers that can be read
            (an answer that cannot be is charged the worst error there could be). Rows that show
            one photograph count as one.
        batch_size: rows answered at once.
        max_tokens: most tokens of an answer; None for the longest reference and a margin.
        dimensions: names that the strict check asks for; None leaves them free.
    """

    def __init__(
        self,
        base: Base,
        features: FeatureStore,
        examples: Sequence[Example],
        name: str,
        *,
        rows: int,
        batch_size: int,
        max_tokens: int | None = None,
        dimensions: Sequence[str] | None = None,
    ) -> None:
        count = min(rows, len(examples))
        self.base = base
        self.features = features
        self.examples = [examples[at * len(examples) // count] for at in range(count)]
        self.name = name
        self.batch_size = batch_size
        self.dimensions = dimensions
        self.max_tokens = max_tokens or Evaluator.limit(self.examples)

    @property
    def larger(self) -> bool:
        """Whether a larger figure is a better one."""
        return self.name == FORMAT

    def __call__(self) -> float | None:
        """The figure; None where no reference has scores.

        Raises:
            ModelError: the model gives logits that are not finite.
        """
        pictures = self.features.get([(one.row.image_sha256, one.pixels) for one in self.examples])
        requests = [
            Request(one.tokens[: one.prompt_length].tolist(), picture, one.pixels.grid)
            for one, picture in zip(self.examples, pictures, strict=True)
        ]
        outputs = generate(
            self.base, requests, max_tokens=self.max_tokens, batch_size=self.batch_size
        )
        values = [
            self._value(output.text, one)
            for output, one in zip(outputs, self.examples, strict=True)
        ]
        photographs = [evidence.photograph(one.row) for one in self.examples]
        found = metrics.by_photograph(values, photographs)
        return fmean(found.values()) if found else None

    def _value(self, text: str, example: Example) -> float | None:
        answer = metrics.read(text, self.dimensions)
        if self.name == FORMAT:
            return float(answer.strict)
        reference = metrics.read(example.row.response)
        error = metrics.score_error(answer.scores, reference.scores)
        return metrics.worst_error(reference.scores) if error is None else error
