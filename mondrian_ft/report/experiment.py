"""``experiments/<name>/README.md``: what finished runs of one experiment gave, side by side.

The question and the decision are a person's to write. The results are ours, and stand between two
marks, so that gathering again replaces them and nothing else.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import wording

BEGIN = "<!-- results: written by task=report, replaced when it runs again -->"
END = "<!-- end of results -->"
ASIDE = ("registry", "serve", "task", "tracking", "experiment_name")
"""Groups of the config that change no number of a run."""
ASIDE_KEYS = frozenset(
    (
        "trainer.resume",
        "trainer.peer_timeout",
        "eval.against",
        "eval.latency",
        "eval.judge_url",
        "eval.judge_key_env",
        "eval.judge_timeout",
    )
)
"""Keys of other groups that change none: those that the schema puts aside, whose room is above."""


@dataclass(frozen=True)
class GatheredRun:
    """One run: its folder's name, its ``run.json``, its comparison if it was evaluated, its log."""

    name: str
    facts: Mapping[str, Any]
    comparison: Mapping[str, Any] | None
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Every key that may change a number, dotted; paths, which change none, are left out."""
        flat: dict[str, Any] = {}
        for group, keys in self.facts.get("config", {}).items():
            if group in ASIDE or not isinstance(keys, Mapping):
                continue
            for key, held in keys.items():
                dotted = f"{group}.{key}"
                if dotted not in ASIDE_KEYS and not (isinstance(held, str) and "/" in held):
                    flat[dotted] = held
        return flat


def differing(runs: Sequence[GatheredRun]) -> list[str]:
    """The dotted config keys that are not the same in all ``runs``."""
    configs = [run.config for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    return [key for key in keys if any(c.get(key) != configs[0].get(key) for c in configs)]


def record(run: GatheredRun) -> dict[str, Any]:
    """A run's figures as ``runs.json`` keeps them; scores in points of 10, None where unknown."""
    facts, evidence = run.facts, (run.comparison or {}).get("evidence", {})
    arms = evidence.get("arms", {})
    tuned, base = arms.get("tuned", {}), arms.get("base", {})
    provenance = facts.get("provenance", {})
    return {
        "run": run.name,
        "command": typed(provenance),
        "task": facts.get("task"),
        "status": facts.get("status"),
        "error": facts.get("error"),
        "commit": (provenance.get("git") or {}).get("commit"),
        "dirty": (provenance.get("git") or {}).get("dirty"),
        "config_hash": facts.get("config_hash"),
        "data_lock": facts.get("data_lock"),
        "base": facts.get("base", {}).get("name"),
        "base_weights": facts.get("base", {}).get("weights"),
        "adapter": (facts.get("adapter") or {}).get("hash"),
        "version": (facts.get("registered") or {}).get("version"),
        "verdict": evidence.get("verdict"),
        "reason": evidence.get("reason"),
        "photographs": evidence.get("n_photographs"),
        "score_mae_base": base.get("score_mae"),
        "score_mae_tuned": tuned.get("score_mae"),
        "score_mae_tuned_interval": tuned.get("score_mae_interval"),
        "score_mae_shuffled": tuned.get("score_mae_shuffled"),
        "score_mae_mean": arms.get("mean_score", {}).get("score_mae"),
        "format_strict_tuned": tuned.get("format_strict"),
        "val_loss": facts.get("training", {}).get("val_loss"),
        "seconds": facts.get("seconds"),
    }


def typed(provenance: Mapping[str, Any]) -> str:
    """The command of a run as one types it: without the path that its program had there."""
    return shlex.join(["python", "-m", "mondrian_ft", *provenance.get("argv", [])[1:]])


def rank(facts: Mapping[str, Any]) -> tuple[bool, float, bool, float]:
    """By score error, then by held-out loss; what is not known comes last."""
    error, loss = facts["score_mae_tuned"], facts["val_loss"]
    return error is None, error or 0.0, loss is None, loss or 0.0


def results(runs: Sequence[GatheredRun], *, page: str | None = None) -> str:
    """The block between the marks: a table of the runs, best first, and what limits it.

    ``page`` is the name of a page beside it that shows more.
    """
    rows = [(record(run), run.config) for run in runs]
    rows.sort(key=lambda row: rank(row[0]))
    swept = differing(runs)
    typed = dict.fromkeys(facts["command"] for facts, _ in rows)
    table = [
        {
            "run": facts["run"],
            **{key: value(config.get(key)) for key in swept},
            "photographs": str(facts["photographs"] or wording.NONE),
            "base": wording.points(facts["score_mae_base"]),
            "tuned": _with_interval(facts),
            "constant": wording.points(facts["score_mae_mean"]),
            "format": wording.percent(facts["format_strict_tuned"]),
            "held-out loss": wording.NONE
            if facts["val_loss"] is None
            else f"{facts['val_loss']:.3f}",
            "verdict": _verdict(facts),
            "adapter": " ".join(
                [(facts["adapter"] or wording.NONE)[:12], *filter(None, [facts["version"]])]
            ),
        }
        for facts, config in rows
    ]
    # A column that says nothing of any run is left out.
    heads = [
        head for head in table[0] if head in swept or {row[head] for row in table} != {wording.NONE}
    ]
    lines = [BEGIN, "", "```console", *(f"$ {command}" for command in typed), "```", ""]
    lines += [_line(heads), _line(["---"] * len(heads))]
    lines += [_line([row[head] for head in heads]) for row in table]
    if "tuned" in heads:
        lines.append(
            "\nScore errors in points of 10, lower is better, with a 95 % interval over "
            "photographs; *constant* gives every photograph the training rows' mean."
        )
    lines += [f"\n{sentence}" for sentence in cautions([facts for facts, _ in rows])]
    lines += [
        f"\nRun {facts['run']} failed: {facts['error']}" for facts, _ in rows if _failed(facts)
    ]
    if page is not None:
        lines.append(f"\nCurves, intervals and settings side by side: [{page}]({page}).")
    return "\n".join([*lines, "", END])


def _verdict(facts: Mapping[str, Any]) -> str:
    """The evaluation's, or what kept a run from one; a training that ended well has none."""
    if facts["verdict"] is None and facts["status"] == "done":
        return wording.NONE
    return (facts["verdict"] or facts["status"] or wording.NONE).replace("_", " ")


def _with_interval(facts: Mapping[str, Any]) -> str:
    interval = wording.interval(facts["score_mae_tuned_interval"])
    return wording.points(facts["score_mae_tuned"]) + (f" ({interval})" if interval else "")


def _failed(facts: Mapping[str, Any]) -> bool:
    return facts["status"] == "failed" and bool(facts["error"])


def cautions(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What forbids reading the table from top to bottom."""
    said = []
    judged = [r for r in records if r["score_mae_tuned"] is not None]
    if len({r["data_lock"] for r in judged}) > 1:
        said.append(
            "**Not all runs are of the same data or split** (their data locks differ), so their "
            "errors cannot be ranked against each other."
        )
    if len({r["base_weights"] for r in judged}) > 1:
        said.append("The runs start from different base models.")
    if len(judged) > 2:
        said.append(
            f"The best of {len(judged)} runs looks better than it is: choosing it used the same "
            "photographs that judge it."
        )
    if commits := {r["commit"] for r in records if r["commit"]}:
        told = ", ".join(sorted(commit[:10] for commit in commits))
        several = "several commits: " if len(commits) > 1 else "commit "
        dirty = " (with uncommitted changes)" if any(r["dirty"] for r in records) else ""
        said.append(f"Run at {several}{told}{dirty}.")
    return said


def page(name: str, block: str, earlier: str | None) -> str:
    """The whole README: ``earlier`` with its results replaced, or a new one to fill in.

    A README without the marks keeps every word, and the results are added at its end.
    """
    if earlier is None:
        return (
            f"# {name}\n\n## Question\n\n_What we want to know, in a sentence._\n\n"
            f"## Result\n\n{block}\n\n## Decision\n\n_What we do now, and what would change our "
            "mind._\n"
        )
    start, end = earlier.find(BEGIN), earlier.find(END)
    if 0 <= start < end:
        return earlier[:start] + block + earlier[end + len(END) :]
    return f"{earlier.rstrip()}\n\n## Result\n\n{block}\n"


def write_page(path: Path, name: str, block: str) -> None:
    """Write or renew ``path``, keeping what a person wrote."""
    from ..files import atomic_write_text

    earlier = path.read_text(encoding="utf-8") if path.is_file() else None
    atomic_write_text(path, page(name, block, earlier))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def value(of: Any) -> str:
    """A key's value in a table."""
    if of is None:
        return "null"
    if isinstance(of, bool):
        return str(of).lower()
    if isinstance(of, list):
        return ", ".join(map(str, of)) or "none"
    return f"{of:g}" if isinstance(of, float) else str(of)
