"""Every reason for which a row of ``jobs`` can stay out of the manifest: a closed list."""

from __future__ import annotations

from enum import StrEnum

from ..errors import DataError
from .critique import Flaw


class Reason(StrEnum):
    """Why a row was left out; the values appear in ``link_report.json`` and keep their meaning."""

    NO_JOB_ID = "no_job_id"
    OTHER_ADVISOR = "other_advisor"
    ADVISOR_UNCLEAR = "advisor_unclear"
    NOT_FINISHED = "not_finished"
    GENERATED = "generated"
    DUPLICATE_ID = "duplicate_id"
    OVER_LIMIT = "over_limit"
    NO_FILENAME = "no_filename"
    UNSAFE_FILENAME = "unsafe_filename"
    PHOTOGRAPH_MISSING = "photograph_missing"
    PHOTOGRAPH_AMBIGUOUS = "photograph_ambiguous"
    PHOTOGRAPH_UNREADABLE = "photograph_unreadable"
    PHOTOGRAPH_TOO_SMALL = "photograph_too_small"
    NO_ANALYSIS = "no_analysis"
    ANALYSIS_MISSING = "analysis_missing"
    ANALYSIS_UNREADABLE = "analysis_unreadable"
    ANALYSIS_TOO_LONG = Flaw.ANALYSIS_TOO_LONG.value
    NO_JSON = Flaw.NO_JSON.value
    BROKEN_JSON = Flaw.BROKEN_JSON.value
    TWO_JSON_BLOCKS = Flaw.TWO_JSON_BLOCKS.value
    ANALYSIS_FAILED = Flaw.ANALYSIS_FAILED.value
    NEEDS_MENDING = "needs_mending"
    WRONG_SHAPE = Flaw.WRONG_SHAPE.value
    INCOMPLETE = Flaw.INCOMPLETE.value
    EMPTY_TEXT = Flaw.EMPTY_TEXT.value
    SCORE_NOT_A_NUMBER = Flaw.SCORE_NOT_A_NUMBER.value
    SCORE_OUT_OF_RANGE = Flaw.SCORE_OUT_OF_RANGE.value


class LeftOut(DataError):
    """One row cannot be used: ``reason`` is the code, ``str()`` the detail for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
