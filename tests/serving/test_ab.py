"""The draw of an A/B test: keyed, sticky, and as often tuned as it was told."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from scipy.stats import binomtest

from mondrian_ft.errors import ServerError
from mondrian_ft.serving.ab import Choice, Mode, Router, UnknownMode, mode_of, secret_of
from mondrian_ft.serving.tally import FILE, Tally

N = 20_000


def router(split: float = 0.5, secret: bytes = b"k" * 32, mode: Mode = Mode.ab_test) -> Router:
    return Router(mode, split, "production", {"watkins": "v3"}, secret)


@pytest.mark.parametrize("split", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("form", ["{}", "user-{:05d}", "3f2b1c9e-0000-4000-8000-{:012x}"])
def test_the_share_lies_within_binomial_limits(split: float, form: str) -> None:
    """For ids of any form, however alike; one in 10,000 honest draws would fail here."""
    drawn = [router(split).choose("ansel", form.format(n)).used for n in range(N)]
    count = drawn.count("ab_test_fine_tuned")
    assert count + drawn.count("ab_test_base") == N
    assert binomtest(count, N, split).pvalue > 1e-4


def test_the_ends_are_exact() -> None:
    """A split of 0 or 1 leaves nobody over."""
    assert {router(0).choose("ansel", str(n)).arm for n in range(999)} == {"base"}
    assert {router(1).choose("ansel", str(n)).arm for n in range(999)} == {"production"}


def test_sticky_and_keyed() -> None:
    """The same with the same secret; with another one as good as independent."""
    one, same, other = router(), router(), router(secret=b"o" * 32)
    keys = [f"u{n}" for n in range(2_000)]
    drawn = [one.choose("ansel", key) for key in keys]
    assert drawn == [same.choose("ansel", key) for key in keys]
    agree = sum(a == other.choose("ansel", key) for a, key in zip(drawn, keys, strict=True))
    assert binomtest(agree, len(keys), 0.5).pvalue > 1e-4
    # A wider split moves people to the tuned model and nobody away from it.
    wider = [router(0.7).choose("ansel", key) for key in keys]
    assert all(w.arm != "base" for d, w in zip(drawn, wider, strict=True) if d.arm != "base")


def test_an_advisor_may_have_an_arm_of_its_own() -> None:
    assert router(1).choose("watkins", "u") == Choice("v3", "ab_test_fine_tuned")
    assert router().choose("watkins", "u", Mode.fine_tuned) == Choice("v3", "fine_tuned")


def test_the_base_never_stands_in() -> None:
    alone = Router(Mode.fine_tuned, 0.5, None, {"watkins": "v3"}, b"k" * 32)
    with pytest.raises(ServerError, match=r"needs an adapter, and this service has none for ansel"):
        alone.choose("ansel", "u")
    assert alone.choose("watkins", "u").arm == "v3"


def test_modes() -> None:
    assert mode_of(" Fine_Tuned ") is Mode.fine_tuned
    assert mode_of("baseline") is Mode.base
    with pytest.raises(UnknownMode, match="did you mean fine_tuned"):
        mode_of("finetuned")


def test_the_secret_is_kept(tmp_path: Path) -> None:
    """Drawn once, for this user's eyes; a damaged file is told and not drawn over."""
    folder = tmp_path / "new" / "state"
    secret = secret_of(folder)
    assert secret_of(folder) == secret
    assert len(secret) == 32
    assert (folder / "secret").stat().st_mode & 0o777 == 0o600
    (folder / "secret").write_text("abc", encoding="ascii")
    with pytest.raises(ServerError, match="does not hold the 64 hexadecimal digits"):
        secret_of(folder)


def test_the_tally() -> None:
    tally = Tally(None, 0.5)
    for seconds in (1.0, 2.0, 3.0):
        tally.answered("ab_test_base", seconds, parsed=seconds < 3)
    tally.answered("ab_test_fine_tuned", 5.0, parsed=True)
    tally.failed("ab_test_fine_tuned")
    report = tally.report()
    base = report["arms"]["ab_test_base"]
    assert base["parse_rate"]["share"] == pytest.approx(2 / 3)
    # Wilson's interval for 2 of 3, as in any table of it.
    assert base["parse_rate"]["low"] == pytest.approx(0.2077, abs=1e-3)
    assert base["parse_rate"]["high"] == pytest.approx(0.9385, abs=1e-3)
    assert base["seconds"]["mean"] == 2.0
    # Student's quantile for two degrees of freedom: 4.303.
    assert base["seconds"]["high"] - 2 == pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert report["arms"]["ab_test_fine_tuned"]["seconds"]["low"] is None
    assert report["share_tuned"]["count"] == 2
    assert report["share_tuned"]["of"] == 5
    nothing = Tally(None, 0.5).report() | {"since": ""}
    assert nothing == {"since": "", "arms": {}, "share_tuned": None}


def test_the_tally_outlives_a_restart(tmp_path: Path) -> None:
    """Each arm says which adapters answered, a changed split starts the share's test anew, and
    what was before a time can be left out."""
    path = tmp_path / FILE
    first = Tally(path, 0.5)
    for n in range(8):
        first.answered("ab_test_fine_tuned", 1.0, True, "a" * 64)
        first.answered("ab_test_base", 2.0, n > 3)
    first.flush()
    again = Tally(path, 0.5)
    again.answered("ab_test_fine_tuned", 3.0, True, "b" * 64)
    again.failed("ab_test_base")
    arms = again.report()["arms"]
    assert arms["ab_test_fine_tuned"]["adapters"] == {"a" * 64: 8, "b" * 64: 1}
    assert arms["ab_test_fine_tuned"]["seconds"]["mean"] == pytest.approx(11 / 9)
    assert (arms["ab_test_base"]["answers"], arms["ab_test_base"]["failed"]) == (8, 1)
    assert arms["ab_test_base"]["parse_rate"]["count"] == 4
    assert again.report()["share_tuned"]["of"] == 18
    changed = Tally(path, 0.9)
    assert changed.report()["share_tuned"] is None, "none was drawn with this split"
    assert changed.report()["arms"] == arms
    assert changed.report(since=time.time() + 60)["arms"] == {}


def test_a_tally_that_cannot_be_written_is_kept(tmp_path: Path) -> None:
    tally = Tally(tmp_path / FILE, 0.5)
    tally.answered("base", 1.0, True)
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ServerError, match="cannot be used: database is locked"):
            tally.report()
        other.rollback()
    assert tally.report()["arms"]["base"]["answers"] == 1
    assert tally.report()["arms"]["base"]["answers"] == 1, "counted once"
    (tmp_path / "bad.db").write_text("no database", encoding="ascii")
    with pytest.raises(ServerError, match="move the file away"):
        Tally(tmp_path / "bad.db", 0.5)
