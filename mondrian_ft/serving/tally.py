"""The tally of an A/B test: every answer with its arm, adapter, time and latency, over restarts."""

from __future__ import annotations

import math
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import ServerError

KEPT = 10_000
"""Latencies of each arm that are looked at, the newest."""
CONFIDENCE = 0.95
FILE = "answers.db"
_TABLE = (
    "CREATE TABLE IF NOT EXISTS answers (at REAL NOT NULL, used TEXT NOT NULL, split REAL NOT NULL,"
    " adapter TEXT, seconds REAL, parsed INTEGER)"
)
_Row = tuple[float, str, float, str | None, float | None, bool | None]


class Tally:
    """Answers counted by ``model_used``; safe with threads.

    What is counted is written by `flush`, in a thread, so that no answer waits for a disk; a crash
    takes what was counted since.

    Args:
        path: the SQLite file, made if it is not there; None keeps everything in memory.
        split: share of the test that goes to the tuned model now.

    Raises:
        ServerError: the file cannot be used.
    """

    def __init__(self, path: Path | None, split: float) -> None:
        self.path, self.split = path, split
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._new: list[_Row] = []
        if path is not None:
            with self._open() as connection:
                connection.execute("PRAGMA journal_mode=WAL")

    def answered(self, used: str, seconds: float, parsed: bool, adapter: str | None = None) -> None:
        """One answer came, and was a critique or not; ``adapter`` is the hash of who gave it."""
        with self._lock:
            self._new.append((time.time(), used, self.split, adapter, seconds, parsed))

    def failed(self, used: str) -> None:
        """No answer came."""
        with self._lock:
            self._new.append((time.time(), used, self.split, None, None, None))

    def flush(self) -> None:
        """Write what was counted.

        Raises:
            ServerError: that cannot be done now; it is kept.
        """
        with self._writing:
            with self._lock:
                rows = list(self._new)
            if self.path is None or not rows:
                return
            with self._open() as connection:
                _insert(connection, rows)
            with self._lock:
                del self._new[: len(rows)]

    def report(self, since: float | None = None) -> dict[str, Any]:
        """Counts, latencies and parse rates by arm, with 95 % intervals.

        Shares are with Wilson's interval (1927), means with Student's; ``share_tuned`` says what
        part of the test went to the tuned model while ``split`` was as it is now, and whether that
        fits: ``p`` is that of an exact binomial test.

        Args:
            since: seconds since 1970; answers before it are left out.

        Raises:
            ServerError: the file cannot be read or written now.
        """
        self.flush()
        after = 0.0 if since is None else since
        with self._open() as connection:
            if self.path is None:
                with self._lock:
                    _insert(connection, self._new)
            (first,) = connection.execute(
                "SELECT min(at) FROM answers WHERE at >= ?", (after,)
            ).fetchone()
            arms = {
                used: _arm(connection, used, after)
                for (used,) in connection.execute(
                    "SELECT DISTINCT used FROM answers WHERE at >= ? ORDER BY used", (after,)
                ).fetchall()
            }
            counts = dict(
                connection.execute(
                    "SELECT used, count(*) FROM answers WHERE at >= ? AND split = ? GROUP BY used",
                    (after, self.split),
                ).fetchall()
            )
        begun = since if since is not None else first or time.time()
        return {
            "since": datetime.fromtimestamp(begun, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "arms": arms,
            "share_tuned": self._share_tuned(counts),
        }

    def _share_tuned(self, counts: dict[str, int]) -> dict[str, Any] | None:
        from scipy.stats import binomtest

        tuned, base = counts.get("ab_test_fine_tuned", 0), counts.get("ab_test_base", 0)
        if not tuned + base:
            return None
        p = float(binomtest(tuned, tuned + base, self.split).pvalue)
        return {**_share(tuned, tuned + base), "split": self.split, "p": p}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            place = ":memory:" if self.path is None else self.path
            with closing(sqlite3.connect(place, timeout=2)) as connection, connection:
                connection.execute(_TABLE)
                yield connection
        except sqlite3.Error as error:
            raise ServerError(
                f"The tally of answers {self.path} cannot be used: {error}; free some space, or "
                "move the file away while the service is stopped, to count from nothing."
            ) from None


def _insert(connection: sqlite3.Connection, rows: Sequence[_Row]) -> None:
    connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)


def _arm(connection: sqlite3.Connection, used: str, after: float) -> dict[str, Any]:
    what = "FROM answers WHERE used = ? AND at >= ?"
    total, answers, parsed = connection.execute(
        f"SELECT count(*), count(parsed), coalesce(sum(parsed), 0) {what}", (used, after)
    ).fetchone()
    seconds = connection.execute(
        f"SELECT seconds {what} AND seconds IS NOT NULL ORDER BY at DESC LIMIT {KEPT}",
        (used, after),
    ).fetchall()
    adapters = connection.execute(
        f"SELECT adapter, count(*) {what} AND adapter IS NOT NULL GROUP BY adapter ORDER BY 1",
        (used, after),
    ).fetchall()
    return {
        "answers": answers,
        "failed": total - answers,
        "parse_rate": _share(parsed, answers) if answers else None,
        "seconds": _seconds([one for (one,) in seconds]) if seconds else None,
        "adapters": dict(adapters),
    }


def _share(count: int, of: int) -> dict[str, Any]:
    from scipy.stats import binomtest

    interval = binomtest(count, of).proportion_ci(CONFIDENCE, method="wilson")
    return {
        "count": count,
        "of": of,
        "share": count / of,
        "low": float(interval.low),
        "high": float(interval.high),
    }


def _seconds(values: Sequence[float]) -> dict[str, Any]:
    """Mean with its interval (None for one value alone), median and 95th percentile, nearest."""
    ordered, n = sorted(values), len(values)
    mean, low, high = statistics.fmean(ordered), None, None
    if n > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(ordered) / math.sqrt(n)
        low, high = mean - half, mean + half
    return {
        "n": n,
        "mean": mean,
        "low": low,
        "high": high,
        "median": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * n) - 1],
    }
