"""What is counted for Prometheus. Labels are the service's own words, never a client's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .protocol import Answer, Fault, State, Status

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
"""Seconds; the sample answers in tenths, a model of 4 B parameters in half a minute."""


class Meters:
    """The service's own registry of meters; safe with threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter(
            "mondrian_requests", "Requests by route and status.", ["route", "status"], **own
        )
        self._answers = Counter(
            "mondrian_answers",
            "Answers of /analyze by model_used, and whether they were critiques.",
            ["model_used", "parsed"],
            **own,
        )
        self._failures = Counter(
            "mondrian_failures", "Asks without an answer.", ["model_used", "fault"], **own
        )
        self._seconds = Histogram(
            "mondrian_answer_seconds",
            "From asking the model to its answer.",
            ["model_used"],
            buckets=BUCKETS,
            **own,
        )
        self._first = Histogram(
            "mondrian_first_token_seconds",
            "From asking the model to its first token.",
            ["model_used"],
            buckets=BUCKETS,
            **own,
        )
        self._tokens = Counter("mondrian_tokens", "Tokens generated.", ["model_used"], **own)
        self._votes = Counter(
            "mondrian_votes", "Votes by model_used.", ["model_used", "vote"], **own
        )
        self._ready = Gauge("mondrian_model_ready", "1 while the model answers.", **own)
        self._waiting = Gauge("mondrian_asks", "Asks waiting or under way.", **own)
        self._restarts = Gauge("mondrian_model_restarts", "Times it was replaced.", **own)
        self._memory = Gauge("mondrian_model_memory_gigabytes", "Resident, of the model.", **own)
        self._unsettled = Gauge(
            "mondrian_jobs_unsettled", "Jobs whose end is not in the database yet.", **own
        )

    def requested(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def answered(self, used: str, parsed: bool) -> None:
        self._answers.labels(used, str(parsed).lower()).inc()

    def generated(self, used: str, answer: Answer, seconds: float) -> None:
        """Any answer, also one that need not be a critique."""
        self._seconds.labels(used).observe(seconds)
        if (first := answer.seconds.get("first_token")) is not None:
            self._first.labels(used).observe(first)
        self._tokens.labels(used).inc(answer.tokens)

    def failed(self, used: str, fault: Fault) -> None:
        self._failures.labels(used, str(fault)).inc()

    def voted(self, used: str, vote: str) -> None:
        self._votes.labels(used, vote).inc()

    def page(self, status: Callable[[], Status], waiting: int, unsettled: int) -> bytes:
        """The text that Prometheus reads, with the model's status as it is now."""
        now = status()
        self._ready.set(now.state is State.ready)
        self._waiting.set(waiting)
        self._restarts.set(now.restarts)
        if now.memory_gb is not None:
            self._memory.set(now.memory_gb)
        self._unsettled.set(unsettled)
        return generate_latest(self.registry)
