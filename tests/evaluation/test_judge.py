"""A judge behind a real endpoint: what it is sent, what counts, and what happens when it fails."""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint import Endpoint, closer, completion, endpoint, prefers
from PIL import ExifTags, Image

from mondrian_ft.errors import DataError, JudgeError
from mondrian_ft.evaluation import assessments, judge
from mondrian_ft.evaluation.assessments import Choice, Pair
from mondrian_ft.evaluation.judge import Judge, Opinion

from .critiques import answer


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A judge without a bias that prefers the tuned answers of `make_pairs`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with endpoint(closer("fine")) as found:
        yield found


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A JPEG that lies on its side, red on what is its left, with a place and a comment."""
    image = Image.new("RGB", (1600, 1200), "blue")
    image.paste("red", (0, 0, 1600, 300))
    exif = Image.Exif()
    # To be shown turned by 90 degrees to the left: its top is then its left.
    exif[ExifTags.Base.Orientation] = 8
    exif[ExifTags.Base.Artist] = "Anna Secret"
    path = tmp_path / "photo.jpg"
    image.save(path, exif=exif, comment=b"Anna Secret")
    return path


def make_pairs(photograph: Path, n: int) -> list[Pair]:
    """Rows of different photographs, by their hashes."""
    return [
        Pair(
            f"job-{index}",
            photograph.name,
            str(photograph),
            f"{index:064x}",
            f"plain {index}",
            f"fine {index}",
            f"reference {index}",
        )
        for index in range(n)
    ]


def counts(facts: dict[str, Any]) -> dict[str, int]:
    return {name: facts[name] for name in judge.OUTCOMES if facts[name]}


def asked(served: Endpoint, pairs: list[Pair], **options: Any) -> dict[str, Any]:
    return judge.summarise(pairs, Judge(served.url, "m", **options).ask(pairs))


def test_each_pair_is_asked_in_both_orders(served: Endpoint, photograph: Path) -> None:
    """The preference is the answer's, not the place's, and goes into an exact test."""
    facts = asked(served, make_pairs(photograph, 6), key="sk-1")
    assert counts(facts) == {"tuned": 6}
    assert facts["p_value"] == pytest.approx(2 / 2**6)
    assert facts["position"] == {"first": 6, "second": 6, "equal": 0}
    assert facts["pairs"][0] == {
        "job_id": "job-0",
        "preferred": "tuned",
        "said": ["tuned", "tuned"],
        "reasons": ["It sees the lake."] * 2,
    }
    texts = [body["messages"][1]["content"][1]["text"] for body in served.requests[:2]]
    assert texts[0] == (
        "<reference>\nreference 0\n</reference>\n\n<A>\nplain 0\n</A>\n\n<B>\nfine 0\n</B>"
    )
    assert texts[1] == (
        "<reference>\nreference 0\n</reference>\n\n<A>\nfine 0\n</A>\n\n<B>\nplain 0\n</B>"
    )
    assert {body["model"] for body in served.requests} == {"m"}
    assert set(served.keys) == {"Bearer sk-1"}


def test_the_photograph_is_upright_small_and_without_metadata(
    served: Endpoint, photograph: Path
) -> None:
    """As the model sees it; who took it and where is nobody's business."""
    asked(served, make_pairs(photograph, 1))
    url = served.requests[0]["messages"][1]["content"][0]["image_url"]["url"]
    start, _, data = url.partition(",")
    assert start == "data:image/jpeg;base64"
    content = base64.b64decode(data)
    assert b"Secret" in photograph.read_bytes()
    assert b"Secret" not in content
    with Image.open(io.BytesIO(content)) as sent:
        assert sent.size == (768, 1024)
        assert not sent.getexif()
        red, blue = sent.getpixel((20, 500)), sent.getpixel((700, 500))
    assert isinstance(red, tuple)
    assert isinstance(blue, tuple)
    assert red[0] > 200 > 50 > red[2]
    assert blue[2] > 200 > 50 > blue[0]


def test_how_an_answer_is_written_tells_nothing(served: Endpoint, photograph: Path) -> None:
    """A fenced critique and a bare one are shown alike; what cannot be read is shown as it is."""
    said = answer(6, 4)
    pair = Pair("j", "i", str(photograph), None, f"```json\n{said}\n```", said, said)
    text = judge.text_of(pair, ("base", "tuned"))
    shown = [text.partition(f"<{name}>")[2].partition("</")[0] for name in ("reference", "A", "B")]
    assert len(set(shown)) == 1
    assert "```" not in text


def test_a_judge_that_goes_by_the_place(served: Endpoint, photograph: Path) -> None:
    """Always A: no preference counts, and the bias is told."""
    served.reply = lambda text: prefers("A")
    facts = asked(served, make_pairs(photograph, 7))
    assert counts(facts) == {"order_dependent": 7}
    assert (facts["p_value"], facts["share"], facts["interval"]) == (None, None, None)
    assert facts["position"] == {"first": 14, "second": 0, "equal": 0}
    facts |= {"model": "m", "agreement": None}
    assert "nothing to test" in judge.sentence(facts)
    told = " ".join(judge.notes(facts))
    assert "In 7 of 7 the preference changed with the order" in told
    assert "came first in 14 of 14 answers" in told


def test_equal_once_and_preferred_once_is_no_preference(served: Endpoint, photograph: Path) -> None:
    """Both orders have to say the same; equal twice is equal."""
    served.reply = lambda text: prefers("equal" if "<A>\nplain" in text else "A")
    facts = asked(served, make_pairs(photograph, 1))
    assert counts(facts) == {"order_dependent": 1}
    served.reply = lambda text: prefers("equal")
    facts = asked(served, make_pairs(photograph, 2))
    assert counts(facts) == {"equal": 2}
    assert facts["position"] == {"first": 0, "second": 0, "equal": 4}


@pytest.mark.parametrize(
    ("answer", "preferred"),
    [
        ('{"preferred": "A", "reason": "x"}', "A"),
        ('{"preferred": "equal"}', "equal"),
        ('```json\n{"preferred": "B", "reason": "x"}\n```', "B"),
        ('<think>A is {"preferred": "A"}, no.</think>\n{"preferred": "B"}', "B"),
        ("", None),
        ("A", None),
        ("I prefer A.", None),
        ('Here it is: {"preferred": "A"}', None),
        ('{"preferred": "A"} {"preferred": "B"}', None),
        ('{"preferred": "A", "preferred": "B"}', None),
        ('{"preferred": "C"}', None),
        ('{"preferred": ["A"]}', None),
        ('{"preferred": true}', None),
        ('{"better": "A"}', None),
        ('["A"]', None),
        ('{"preferred": "A", "reason": "cut o', None),
        ("[" * 100_000, None),
    ],
)
def test_what_is_not_the_json_that_was_asked_for_is_not_guessed(
    answer: str, preferred: str | None
) -> None:
    """Thinking and a fence may stand around it, and nothing else."""
    assert judge.read(answer)[0] == preferred


def test_reasons_are_harmless() -> None:
    """One short line: no escape sequence for a terminal, no half of a letter that no file takes."""
    reason = r"A sees\nthe \u001b[31mlake \ud800" + "." * 1000
    _, told = judge.read('{"preferred": "A", "reason": "' + reason + '"}')
    assert told.startswith("A sees the [31mlake ...")
    assert len(told) == judge.REASON
    assert told.encode("utf-8")


def test_answers_that_cannot_be_read_are_counted(served: Endpoint, photograph: Path) -> None:
    """One of two is enough to lose a pair; the other pairs stay."""
    good = closer("fine")
    served.reply = lambda text: "Both are nice." if "<A>\nfine 1" in text else good(text)
    facts = asked(served, make_pairs(photograph, 3))
    assert counts(facts) == {"tuned": 2, "unreadable": 1}
    assert facts["pairs"][1]["said"] == ["tuned", None]
    told = " ".join(judge.notes(facts | {"model": "m", "agreement": None}))
    assert "In 1 of 3 an answer of the judge could not be read." in told


def test_a_repeat_costs_nothing(served: Endpoint, photograph: Path, tmp_path: Path) -> None:
    """Only what is new is asked: another answer, another model, another address."""
    pairs = make_pairs(photograph, 3)
    first = asked(served, pairs, cache=tmp_path / "judge")
    assert len(served.requests) == 6
    photograph.unlink()
    assert asked(served, pairs, cache=tmp_path / "judge") == first
    assert len(served.requests) == 6
    changed = [*pairs[:2], Pair(**{**vars(pairs[2]), "tuned": "fine, and other"})]
    assert Judge(served.url, "m", cache=tmp_path / "judge").new(changed) == changed[2:]
    assert Judge(served.url, "other", cache=tmp_path / "judge").new(pairs) == pairs
    assert Judge(f"{served.url}/", "m", cache=tmp_path / "judge").new(pairs) == pairs
    kept = "".join(path.read_text() for path in (tmp_path / "judge").iterdir())
    assert "sk-" not in kept


def test_what_was_said_before_a_failure_is_kept(
    served: Endpoint, photograph: Path, tmp_path: Path
) -> None:
    """The next evaluation goes on there."""
    good = closer("fine")

    def reply(text: str) -> str:
        if len(served.requests) == 4:
            served.failures = [(400, '{"error": {"message": "too long"}}')]
        return good(text)

    served.reply = reply
    pairs = make_pairs(photograph, 4)
    with pytest.raises(JudgeError, match=r"refuses \(HTTP 400: .*too long"):
        asked(served, pairs, cache=tmp_path)
    assert Judge(served.url, "m", cache=tmp_path).new(pairs) == pairs[2:]
    assert counts(asked(served, pairs, cache=tmp_path)) == {"tuned": 4}
    assert len(served.requests) == 8


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_asked_again(served: Endpoint, photograph: Path, status: int) -> None:
    """A rate limit and a server that stumbles cost a repeat, not the judgement."""
    served.failures = [(status, '{"error": {"message": "slow down"}}')] * 2
    assert counts(asked(served, make_pairs(photograph, 1))) == {"tuned": 1}
    assert len(served.keys) == 4


@pytest.mark.parametrize(
    ("failure", "key", "told"),
    [
        ((401, '{"error": {"message": "bad key sk-1"}}'), "sk-1", "does not accept the key in KEY"),
        ((403, "{}"), "sk-1", r"does not accept the key in KEY \(HTTP 403\)"),
        ((401, "{}"), "", r"wants a key \(HTTP 401\), and KEY is not set"),
        ((404, '{"error": {"message": "no model m"}}'), "", r"refuses \(HTTP 404: .*no model m"),
        ((400, '{"error": {"message": "sk-1 cannot"}}'), "sk-1", r"HTTP 400: .*… cannot"),
        ((429, "{}"), "", r"HTTP 429\), still after 3 repeats"),
        ((500, "<html>oops</html>"), "", r"refuses \(HTTP 500: "),
        ((200, "<html>a page</html>"), "", "not with a chat completion"),
        ((200, '{"hello": 1}'), "", "not with a chat completion"),
        ((200, "{cut"), "", "not with a chat completion"),
        ((200, '{"choices": []}'), "", "not with a chat completion"),
        ((200, '{"choices": [7]}'), "", "not with a chat completion"),
        ((200, '{"choices": [{"message": null}]}'), "", "not with a chat completion"),
    ],
)
def test_an_endpoint_that_fails(
    served: Endpoint, photograph: Path, failure: tuple[int, str], key: str, told: str
) -> None:
    """One sentence that names judge and address, and never the key."""
    served.failures = [failure] * 9
    with pytest.raises(JudgeError, match=told) as caught:
        asked(served, make_pairs(photograph, 2), key=key, key_name="KEY")
    assert f"The judge m at {served.url}" in str(caught.value)
    assert "sk-1" not in str(caught.value)
    assert len(served.requests) == 0


def test_a_refusal_is_an_answer_that_cannot_be_read(served: Endpoint, photograph: Path) -> None:
    """No content at all, as models send that decline."""
    body = completion("")
    body["choices"][0]["message"]["content"] = None
    served.failures = [(200, json.dumps(body))] * 2
    assert counts(asked(served, make_pairs(photograph, 1))) == {"unreadable": 1}


def test_nobody_listens(photograph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is told with its reason."""
    monkeypatch.setattr(judge, "RETRIES", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match=r"cannot be reached \(.+\); see eval\.judge_url"):
            Judge(url, "m").ask(make_pairs(photograph, 1))


def test_an_endpoint_that_never_answers(
    served: Endpoint, photograph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for as long as was said, not for ever."""
    monkeypatch.setattr(judge, "RETRIES", 0)
    served.wait = threading.Event()
    try:
        with pytest.raises(JudgeError, match=r"did not answer within 0\.2 s \(eval\.judge_timeout"):
            asked(served, make_pairs(photograph, 1), timeout=0.2)
    finally:
        served.wait.set()


def test_a_key_that_no_header_can_hold(served: Endpoint, photograph: Path) -> None:
    """Told by the variable's name; a line break at its end, as of a file, does no harm."""
    for key in ("sk-schlüssel…", "sk-one\nsk-two"):
        with pytest.raises(JudgeError, match="KEY holds no key") as caught:
            asked(served, make_pairs(photograph, 1), key=key, key_name="KEY")
        assert "sk-" not in str(caught.value)
    assert served.keys == []
    assert counts(asked(served, make_pairs(photograph, 1), key="sk-1\n")) == {"tuned": 1}
    assert served.keys[-1] == "Bearer sk-1"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"pip install 'mondrian_ft\[judge\]'"):
        Judge("http://127.0.0.1:1/v1", "m")


def test_a_photograph_that_is_gone(served: Endpoint, photograph: Path) -> None:
    """Nothing is asked about a picture that cannot be shown."""
    pairs = make_pairs(photograph, 1)
    photograph.unlink()
    with pytest.raises(DataError, match=r"photo\.jpg does not exist"):
        asked(served, pairs)
    assert served.keys == []


def opinions(*outcomes: str) -> list[Opinion]:
    said: dict[str, tuple[str | None, str | None]] = {
        "order_dependent": ("base", "tuned"),
        "unreadable": (None, "tuned"),
    }
    return [Opinion(said.get(outcome, (outcome, outcome)), ("", "")) for outcome in outcomes]


def same_photograph(n: int) -> list[Pair]:
    return [Pair(f"job-{i}", "i", "p", "a" * 64, f"b{i}", f"t{i}", "r") for i in range(n)]


@pytest.mark.parametrize(
    ("rows", "together"),
    [
        (["tuned", "tuned", "base"], "tuned"),
        (["tuned", "order_dependent"], "tuned"),
        (["unreadable", "base"], "base"),
        (["tuned", "base"], "equal"),
        (["equal", "unreadable"], "equal"),
        (["equal", "order_dependent"], "order_dependent"),
        (["unreadable", "unreadable"], "unreadable"),
    ],
)
def test_photographs_are_the_unit(rows: list[str], together: str) -> None:
    """Rows that share a photograph count once."""
    facts = judge.summarise(same_photograph(len(rows)), opinions(*rows))
    assert counts(facts) == {together: 1}
    assert facts["n"] == 1


def judged_by_people(path: Path, pairs: list[Pair], preferred: str) -> assessments.Assessments:
    """People's judgements of the pairs: t, b or e for each, - for none."""
    for pair, letter in zip(pairs, preferred, strict=True):
        choices = {"t": Choice.LEFT, "b": Choice.RIGHT, "e": Choice.EQUAL}
        if letter in choices:
            assessments.append(
                path, assessments.judge(pair, choices[letter], left="tuned", adapter=None)
            )
    return assessments.read(path)


def test_agreement_with_people(photograph: Path, tmp_path: Path) -> None:
    """By photograph that both judged; what depends on the order is equal, the rest left out."""
    pairs = make_pairs(photograph, 7)
    facts = judge.summarise(
        pairs,
        opinions("tuned", "tuned", "base", "order_dependent", "unreadable", "tuned", "tuned"),
    )
    found = judged_by_people(tmp_path / "a.jsonl", pairs, "ttbett-")
    # tuned, tuned, base, equal, tuned: the same in all five.
    both = judge.agreement(facts, pairs, found)
    assert both == {"n": 5, "share": 1.0, "kappa": 1.0}
    # Judge ttbet and people tbbet: by chance (3*2 + 1*2 + 1*1) / 25.
    found = judged_by_people(tmp_path / "b.jsonl", pairs, "tbbett-")
    both = judge.agreement(facts, pairs, found)
    assert both is not None
    assert both["share"] == 0.8
    assert both["kappa"] == pytest.approx((0.8 - 9 / 25) / (1 - 9 / 25))
    told = " ".join(judge.notes(facts | {"model": "m", "agreement": both}))
    assert "what people say in 80 % of 5 photographs (Cohen's kappa 0.69)" in told


def test_people_who_judged_nothing_or_other_answers(photograph: Path, tmp_path: Path) -> None:
    """No agreement is told, neither of nothing nor of what is no longer there."""
    pairs = make_pairs(photograph, 2)
    facts = judge.summarise(pairs, opinions("tuned", "base"))
    assert judge.agreement(facts, pairs, assessments.read(tmp_path / "none.jsonl")) is None
    found = judged_by_people(tmp_path / "a.jsonl", pairs, "tt")
    changed = [Pair(**{**vars(pair), "tuned": "another"}) for pair in pairs]
    assert judge.agreement(facts, changed, found) is None
    assert judge.agreement({"error": "gone"}, pairs, found) is None
