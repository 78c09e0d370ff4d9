"""Numbered versions of adapters, in plain files, and channels that move on evidence.

``<root>/<name>/`` holds ``v1/``, ``v2/``, … (adapter directories, their files read-only),
``evidence/`` (what their evaluations found), ``channels/<channel>.json`` (which version a channel
means, for other programs) and ``history.jsonl``. The history is only appended to, and each line
holds the hash of the line before, so what happened cannot be changed unnoticed. All else follows
from it.
"""

from .catalog import (
    Version,
    file_report,
    history,
    label_of,
    register,
    repair,
    resolve,
    serves,
    versions,
)
from .chain import Place
from .channels import Lock, Outcome, preview, promote, prune, rollback, who
from .gate import Decision, Occupant, Reason, Rules, Subject, decide
from .store import MANIFEST, REPORT, REQUIRED, home_of

__all__ = [
    "MANIFEST",
    "REPORT",
    "REQUIRED",
    "Decision",
    "Lock",
    "Occupant",
    "Outcome",
    "Place",
    "Reason",
    "Rules",
    "Subject",
    "Version",
    "decide",
    "file_report",
    "history",
    "home_of",
    "label_of",
    "preview",
    "promote",
    "prune",
    "register",
    "repair",
    "resolve",
    "rollback",
    "serves",
    "versions",
    "who",
]
