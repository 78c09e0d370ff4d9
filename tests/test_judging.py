"""The judge in a run: what is said before anything is sent, and what becomes of what it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint import Endpoint, closer, endpoint, prefers

from mondrian_ft.config import Config
from mondrian_ft.errors import JudgeError
from mondrian_ft.evaluation import assessments, judge
from mondrian_ft.evaluation.assessments import Choice
from mondrian_ft.pipeline import assessing, judging
from mondrian_ft.report import html
from mondrian_ft.run import Run
from mondrian_ft.schema import EvalConfig, TrackingConfig, TrackingMode
from tests.report.test_schema import faults
from tests.serving.compared import make_report


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Endpoint]:
    """A judge that prefers the tuned answers of `make_report`; runs are opened in ``tmp_path``."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    with endpoint(closer("Fine")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight pairs with their photographs."""
    path = make_report(tmp_path_factory.mktemp("made"))
    return json.loads(path.read_text(encoding="utf-8"))


def config_of(served: Endpoint, **more: Any) -> Config:
    tracking = TrackingConfig(mode=TrackingMode.disabled)
    judged = EvalConfig(judge_url=served.url, judge_model="m", **more)
    return Config(eval=judged, tracking=tracking)


def run(config: Config, report: dict[str, Any], folder: str = "run") -> tuple[dict[str, Any], Path]:
    """The report with what the judge said, and the run folder."""
    with Run.open(config, folder) as opened:
        return judging.judged(config, opened, report), opened.folder


def test_nothing_is_sent_unless_an_address_is_set(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a key lies in the environment, and without the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setitem(sys.modules, "openai", None)
    config = Config(tracking=TrackingConfig(mode=TrackingMode.disabled))
    judging.check(config)
    found, folder = run(config, report)
    assert found is report
    assert "judge" not in found["evidence"]
    assert not (folder / "evaluation").exists()


def test_what_leaves_is_said_before_it_does(
    served: Endpoint,
    report: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The address, how many photographs, with what, and whose key; nothing where all is known."""
    said: list[str] = []

    def reply(text: str) -> str:
        said.append(capsys.readouterr().out)
        return prefers("equal")

    served.reply = reply
    monkeypatch.setenv("OTHER_KEY", "sk-1")
    config = config_of(served, judge_key_env="OTHER_KEY")
    run(config, report)
    assert f"8 photographs will be sent to {served.url} (with the key of OTHER_KEY)" in said[0]
    assert "JPEG of at most 1024 pixels without metadata" in said[0]
    assert "sk-1" not in "".join(said)
    assert set(served.keys) == {"Bearer sk-1"}
    capsys.readouterr()
    run(config, report, "again")
    assert "will be sent" not in capsys.readouterr().out
    assert len(served.requests) == 16


def test_the_judge_is_told_everywhere_and_decides_nothing(
    served: Endpoint, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Report, page, terminal and run.json; the verdict and all else stay as they were."""
    found, folder = run(config_of(served), report)
    facts = found["evidence"]["judge"]
    assert (facts["tuned"], facts["n"], facts["agreement"]) == (8, 8, None)
    assert faults(found) == []
    rest = {key: value for key, value in found["evidence"].items() if key != "judge"}
    assert {**found, "evidence": rest} == report
    sentence = judge.sentence(facts)
    assert sentence == (
        "Judge m: in 8 of 8 photographs the tuned critique was preferred, in 0 the base's, "
        "0 equal; exact sign test p = 0.008."
    )
    assert sentence in capsys.readouterr().out.replace("\n", " ")
    page = html.write(found, None, {}, folder / "report.html").read_text(encoding="utf-8")
    assert sentence.replace("'", "&#39;") in page
    assert "It does not count for the verdict." in page
    assert html.write(report, None, {}, folder / "report.html").read_text().count("Judge m") == 0
    recorded = json.loads((folder / "run.json").read_text())["judge"]
    assert recorded == {key: value for key, value in facts.items() if key != "pairs"}


def test_a_judge_that_fails_loses_nothing(
    served: Endpoint, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning, a sentence in the report and on the page; the evaluation was written before."""
    served.failures = [(401, "{}")]
    found, folder = run(config_of(served), report)
    facts = found["evidence"]["judge"]
    assert facts == {
        "model": "m",
        "url": served.url,
        "error": f"The judge m at {served.url} wants a key (HTTP 401), and OPENAI_API_KEY is not "
        "set.",
    }
    assert faults(found) == []
    assert "warning: the judge could not be asked: " in capsys.readouterr().err
    assert json.loads((folder / "evaluation" / "comparison_report.json").read_text()) == report
    page = html.write(found, None, {}, folder / "report.html").read_text(encoding="utf-8")
    assert "The judge could not be asked. The judge m at " in page


def test_a_stop_while_the_judge_thinks_loses_nothing(
    served: Endpoint, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C stops the run, and the evaluation is on the disk."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(judge.Judge, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config_of(served), report)
    kept = Path("run") / "evaluation" / "comparison_report.json"
    assert json.loads(kept.read_text()) == report


def test_one_model_alone_is_not_judged(
    served: Endpoint, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an adapter there is nothing to compare."""
    metrics = {"base_model": report["metrics"]["base_model"]}
    found, _ = run(config_of(served), {**report, "metrics": metrics})
    assert "judge" not in found["evidence"]
    assert "it compares base and tuned" in capsys.readouterr().err
    assert served.keys == []


def test_a_judge_that_cannot_be_asked_is_told_before_the_work(
    served: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training should not come first."""
    judging.check(config_of(served))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"mondrian_ft\[judge\]"):
        judging.check(config_of(served))


def say(folder: Path, report: dict[str, Any], *preferred: str) -> None:
    """People's judgements of the first pairs, beside the report."""
    pairs = assessments.pairs_of(report, "r")
    for pair, side in zip(pairs, preferred, strict=False):
        chosen = assessments.judge(pair, Choice(side), left="tuned", adapter="abc123")
        assessments.append(folder / assessments.ASSESSMENTS_NAME, chosen)


def test_people_who_judged_before_are_compared_at_once(
    served: Endpoint, report: dict[str, Any], tmp_path: Path
) -> None:
    """An evaluation that is repeated into the same place finds what people said of its answers."""
    say(tmp_path / "kept", report, "left", "left", "right", "equal")
    place = str(tmp_path / "kept" / "comparison_report.json")
    found, _ = run(config_of(served, report=place), report)
    agreed = found["evidence"]["judge"]["agreement"]
    assert agreed == {"n": 4, "share": 0.5, "kappa": 0.0}


def test_people_who_judge_later_are_compared_then(
    served: Endpoint, report: dict[str, Any], tmp_path: Path
) -> None:
    """``task=assess`` adds the agreement to report and page, and takes it back with the last."""
    config = config_of(served)
    folder = tmp_path / "evaluation"
    with Run.open(config, "run") as opened:
        found = judging.judged(config, opened, report)
        folder.mkdir()
        path = folder / "comparison_report.json"
        path.write_text(json.dumps(found), encoding="utf-8")
        html.write(found, None, {}, folder / "report.html")
        pairs = assessments.pairs_of(found, path)
        page = folder / "report.html"
        assert "is not known: nobody judged these answers yet" in page.read_text(encoding="utf-8")

        say(folder, found, "left", "left", "left", "right")
        assessing.tell(opened, path, folder, pairs)
        after = json.loads(path.read_text(encoding="utf-8"))
        assert after["evidence"]["people"]["tuned"] == 3
        assert after["evidence"]["judge"]["agreement"] == {"n": 4, "share": 0.75, "kappa": 0.0}
        assert after["evidence"]["judge"]["pairs"] == found["evidence"]["judge"]["pairs"]
        assert faults(after) == []
        text = page.read_text(encoding="utf-8")
        assert "what people say in 75 % of 4 photographs (Cohen&#39;s kappa 0.00)" in text
        assert text.count("What a model preferred") == text.count("What people preferred") == 1

        say(folder, found, "undo", "undo", "undo", "undo")
        assessing.tell(opened, path, folder, pairs)
        after = json.loads(path.read_text(encoding="utf-8"))
        assert "people" not in after["evidence"]
        assert after["evidence"]["judge"]["agreement"] is None
        assert json.loads((tmp_path / "run" / "run.json").read_text())["warnings"] == []


def test_what_a_judge_writes_cannot_get_into_the_page(
    served: Endpoint, report: dict[str, Any], tmp_path: Path
) -> None:
    """Its error message is another machine's text."""
    served.failures = [(400, '{"error": {"message": "<script>1</script><!-- /people -->"}}')]
    found, _ = run(config_of(served), report)
    assert "<script>1" in found["evidence"]["judge"]["error"]
    page = html.write(found, None, {}, tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script>1" not in page
    assert page.count("<!-- /people -->") == 1
