"""What docs/service.md and deploy/ tell people to type, install and watch fits this service."""

from __future__ import annotations

import plistlib
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from mondrian_ft.config import load, register_schemas
from mondrian_ft.keys import keys
from mondrian_ft.schema import Config
from mondrian_ft.serving import measuring, patience
from mondrian_ft.serving.protocol import Answer, Fault, Identity, State, Status
from mondrian_ft.serving.supervisor import Limits
from mondrian_ft.tasks import Serve

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STOPPING = patience.GRACE_SECONDS + Limits().stopping
"""Seconds that a stop may take: answers under way end, then the model's process."""


@pytest.fixture(scope="module", autouse=True)
def hydra_conf() -> Iterator[None]:
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def composed(words: list[str]) -> Config:
    """The config of a command's words; flags that are Hydra's own say nothing about it."""
    sweep = "-m" in words
    overrides = [word for word in words if not word.startswith("-")]
    if sweep:  # The first job's, of keys that have several values.
        # Of a range that is searched, its lower end.
        ends = [re.sub(r"^([\w.]+=).*\binterval\(([^,]+),.*", r"\1\2", word) for word in overrides]
        overrides = [re.sub(r"^([\w.]+=[^\[{,]+),.*", r"\1", word) for word in ends]
    return load(compose("config", overrides), ROOT)


def commands(page: Path) -> list[list[str]]:
    """The words behind ``python -m mondrian_ft`` of every command in a page's blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    text = _expanded("\n".join(blocks).replace("\\\n", " "))
    found = re.findall(r"^[^#\n]*?\bpython -m mondrian_ft\b(.*)$", text, re.MULTILINE)
    return [_before_shell(shlex.split(line, comments=True)) for line in found]


def _expanded(text: str) -> str:
    """With the words of ``NAME=(…)`` in place of each ``"${NAME[@]}"``."""
    arrays = r"^(?:\$ )?(\w+)=\(([^()]*)\)"
    for name, _ in re.findall(arrays, text, re.MULTILINE):
        # Looked up now: one array may have another's words, which have been put in by then.
        words = dict(re.findall(arrays, text, re.MULTILINE))[name]
        text = text.replace(f'"${{{name}[@]}}"', words)
    return text


def _before_shell(words: list[str]) -> list[str]:
    """Without what is the shell's: where it goes on in the background, or its output elsewhere."""
    return list(takewhile(lambda word: word not in ("&", "&&", "|", ";", ">"), words))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.stem == "service" else pytest.mark.full)
        for page in PAGES
    ],
)
def test_documented_commands_compose(page: Path) -> None:
    """What stands in angle brackets is the reader's to fill in."""
    for words in commands(page):
        if "--help" not in words and "…" not in " ".join(words):
            composed([re.sub(r"<\w+>", "x", word) for word in words])


def test_the_service_page_has_its_commands_and_keys() -> None:
    """Each key it names is one, and all of the group ``serve`` are in it."""
    page = ROOT / "docs" / "service.md"
    text = page.read_text(encoding="utf-8")
    tasks = [word for words in commands(page) for word in words if word.startswith("task=")]
    assert {"task=serve", "task=migrate", "task=promote", "task=rollback"} <= set(tasks)
    known = set(keys())
    named = set(re.findall(r"\b(?:serve|task|data|registry)\.(?!md)[a-z_]+[a-z]\b", text))
    assert named <= known, sorted(named - known)
    missing = {key for key in known if key.startswith("serve.")} - named
    assert not missing, f"docs/service.md says nothing of {sorted(missing)}"
    for name in re.findall(r"\]\(\.\./deploy/([\w.-]+)\)", text):
        assert (DEPLOY / name).is_file(), name


def served(words: list[str]) -> Config:
    """The config of a command in a file of ``deploy``, which is to serve a tuned model."""
    assert words[1:3] == ["-m", "mondrian_ft"]
    config = composed(words[3:])
    assert isinstance(config.task, Serve)
    assert (config.task.model_mode, config.task.adapter) == ("fine_tuned", "production")
    return config


def unit() -> dict[str, str]:
    """The settings of the systemd unit; none is there twice."""
    text = (DEPLOY / "mondrian-advisor.service").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and line[0] not in "#["]
    pairs = [line.split("=", 1) for line in lines]
    settings = {one[0]: one[1] for one in pairs}
    assert len(settings) == len(pairs)
    return settings


def test_the_systemd_unit() -> None:
    """Its command composes, and it leaves the service the time to end its answers."""
    settings = unit()
    config = served(shlex.split(settings["ExecStart"]))
    assert int(settings["TimeoutStopSec"]) > STOPPING
    assert settings["KillMode"] == "mixed", "the model's process ends after the answers under way"
    assert int(settings["LimitNOFILE"]) >= config.serve.max_requests + 256
    assert settings["ReadWritePaths"] == settings["WorkingDirectory"]


def test_the_launchd_agent() -> None:
    """The same of the property list, which plutil would read as plistlib does."""
    with (DEPLOY / "org.mondrian.advisor.plist").open("rb") as file:
        agent: dict[str, Any] = plistlib.load(file)
    config = served(agent["ProgramArguments"])
    assert agent["Label"] == "org.mondrian.advisor"
    assert agent["ExitTimeOut"] > STOPPING
    assert agent["Umask"] == 0o077
    assert agent["SoftResourceLimits"]["NumberOfFiles"] >= config.serve.max_requests + 256
    words = shlex.split(unit()["ExecStart"])
    assert agent["ProgramArguments"][1:] == words[1:], "one is served as the other"


def meters() -> set[str]:
    """The names on a page of /metrics after one answer and one failure."""
    made = measuring.Meters()
    identity = Identity("base", None, None, "m", "w", "p")
    answer = Answer("1", identity, "", True, 1, 1, {"first_token": 0.1})
    made.requested("/analyze", 200)
    made.generated("base", answer, 1.0)
    made.answered("base", parsed=True)
    made.failed("base", Fault.adapter)
    made.voted("base", "up")
    text = made.page(lambda: Status(State.ready, memory_gb=1.0), 0, 0).decode()
    return set(re.findall(r"^(mondrian_\w+)", text, re.MULTILINE))


def test_alerts_watch_what_there_is() -> None:
    """Every metric and label of the rules and of the page is one of /metrics."""
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    known = meters()
    for rule in group["rules"]:
        found = set(re.findall(r"\bmondrian_\w+", rule["expr"]))
        assert found <= known, (rule["alert"], found - known)
        assert found or rule["expr"].startswith("up{")
        assert rule["annotations"]["summary"].endswith(".")
        for fault in re.findall(r'fault="(\w+)"', rule["expr"]):
            assert fault in set(Fault)
    page = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(mondrian_\w+)`", page)) <= known | {"mondrian_answer_seconds"} | {
        "mondrian_first_token_seconds",
        "mondrian_ft",
    }
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"{Serve().host}:{Serve().port}"]
    assert f'job="{job["job_name"]}"' in str(group)


def test_the_proxy_lets_through_what_the_service_takes() -> None:
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    most, seconds = re.search(r"client_max_body_size (\d+)m", text), re.search(r"(\d+)s;", text)
    assert most is not None
    assert seconds is not None
    serve = Config().serve
    assert int(most[1]) * 2**20 > serve.max_upload_mb * 1_000_000 * 4 // 3 + 1_000_000
    assert serve.deadline is not None
    assert int(seconds[1]) > serve.deadline
    assert f"proxy_pass http://{Serve().host}:{Serve().port};" in text
