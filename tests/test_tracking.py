"""The numbers always reach the JSONL file, and W&B can neither ask for nor stop anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mondrian_ft.errors import MondrianError
from mondrian_ft.registry import Version
from mondrian_ft.run import Run
from mondrian_ft.schema import Config, TrackingMode
from mondrian_ft.tasks import Link
from mondrian_ft.tracking import (
    JsonlTracker,
    Trackers,
    WandbTracker,
    background,
    logged_in,
    wandb_mode,
    weights_and_biases,
)
from mondrian_ft.tracking.offline import records

KEY = "0" * 40


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    """Whoever runs the tests may be logged in to W&B; the tests are not."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.delenv("NETRC", raising=False)
    weights_and_biases.REFUSED.clear()


class FakeWandb(types.ModuleType):
    """Stands in for W&B and remembers; ``broken`` names what fails."""

    def __init__(self, *broken: str) -> None:
        super().__init__("wandb")
        self.broken = broken
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.summary: dict[str, Any] = {}
        self.defined: dict[str, dict[str, Any]] = {}
        self.exits: list[int] = []

    def _maybe(self, what: str) -> None:
        if what in self.broken:
            raise ConnectionError(f"{what} is down.\nsecond line")

    @property
    def finished(self) -> int:
        return len(self.exits)

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def setup(self, settings: Any) -> None:
        pass

    def teardown(self) -> None:
        pass

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined[name] = options

    def init(self, **arguments: Any) -> FakeWandb:
        self.inits.append(arguments)
        self._maybe(arguments["mode"])
        self.offline = arguments["mode"] == "offline"
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._maybe("log")
        self.logged.append((metrics, step))

    def finish(self, exit_code: int = 0) -> None:
        self.exits.append(exit_code)
        self._maybe("finish")


def fake(monkeypatch: pytest.MonkeyPatch, *broken: str) -> FakeWandb:
    module = FakeWandb(*broken)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_jsonl_has_one_flushed_line_per_call(tmp_path: Path) -> None:
    """The log can be followed while it is written, and a second opening goes on with it."""
    path = tmp_path / "deep" / "training_log.jsonl"
    tracker = JsonlTracker(path)
    assert not path.exists()
    tracker.log({"loss": 1.5, "tokens": 3}, step=1)
    assert lines(path) == [{"kind": "step", "step": 1, "loss": 1.5, "tokens": 3}]
    tracker.log({"val_loss": 2.0}, step=1, kind="eval")
    tracker.close()
    tracker.close()
    again = JsonlTracker(path)
    again.log({"loss": float("inf")}, step=2)
    again.close()
    assert lines(path)[1:] == [
        {"kind": "eval", "step": 1, "val_loss": 2.0},
        {"kind": "step", "step": 2, "loss": None},
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_jsonl_on_a_full_disk_is_a_sentence() -> None:
    """The log is always on, so a disk that cannot take it is told, with the path."""
    tracker = JsonlTracker("/dev/full")
    with pytest.raises(MondrianError, match="cannot write /dev/full: No space left"):
        tracker.log({"loss": 1.0}, step=1)
    tracker.close()


@pytest.mark.parametrize(
    ("mode", "environ", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_DISABLED": "true"}, "disabled"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
        ("online", {"WANDB_API_KEY": KEY}, "online"),
    ],
)
def test_mode(mode: str, environ: dict[str, str], expected: str) -> None:
    """Online when logged in, offline otherwise; W&B's own variables count with ``auto``."""
    home = {"HOME": os.environ["HOME"]}
    assert wandb_mode(mode, home | environ) == (expected, None)


def test_online_without_a_key_is_offline_with_a_warning() -> None:
    """W&B would stop and ask for a key; we say what is missing and go on."""
    mode, warning = wandb_mode("online", {"HOME": os.environ["HOME"]})
    assert mode == "offline"
    assert warning is not None
    assert "wandb login" in warning


def test_logged_in_looks_where_wandb_looks(tmp_path: Path) -> None:
    """The netrc entry of the server in use counts, and no other."""
    home = {"HOME": str(tmp_path)}
    assert not logged_in(home)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert logged_in(home)
    assert not logged_in(home | {"WANDB_BASE_URL": "https://wandb.example.org"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert logged_in(
        home | {"WANDB_BASE_URL": "https://wandb.example.org", "NETRC": str(elsewhere)}
    )
    (tmp_path / ".netrc").write_text("machine \n nonsense {{{")
    assert not logged_in(home)


def test_wandb_waits_for_the_first_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks without numbers, such as link, never pay for W&B."""
    module = fake(monkeypatch)
    tracker = WandbTracker("offline", tmp_path, {"project": "p"}, pytest.fail)
    tracker.close()
    assert module.inits == []
    tracker.log({"loss": 1.0}, step=1)
    tracker.log({"val_loss": 2.0}, step=1, kind="eval")
    tracker.close()
    tracker.close()
    assert [call["mode"] for call in module.inits] == ["offline"]
    assert module.inits[0]["dir"] == str(tmp_path)
    assert module.logged == [
        ({"train/loss": 1.0, "train/step": 1}, 1),
        ({"eval/val_loss": 2.0, "train/step": 1}, 1),
    ]
    assert {"train/*", "eval/*", "eval/val_loss"} <= module.defined.keys()
    assert {options["step_metric"] for options in module.defined.values()} == {"train/step"}
    assert module.finished == 1


def test_an_unreachable_server_means_offline_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number is lost when the network is down: the run is kept for a later sync."""
    module = fake(monkeypatch, "online")
    warnings: list[str] = []
    tracker = WandbTracker("online", tmp_path, {}, warnings.append)
    tracker.log({"loss": 1.0}, step=1)
    tracker.log({"loss": 0.5}, step=2)
    tracker.close()
    assert [call["mode"] for call in module.inits] == ["online", "offline"]
    assert len(module.logged) == 2
    assert len(warnings) == 1
    assert "W&B cannot be reached (online is down)" in warnings[0]
    assert "second line" not in warnings[0]
    # The next job of a sweep does not ask a server that does not answer.
    again = WandbTracker("online", tmp_path, {}, warnings.append)
    again.log({"loss": 1.0}, step=1)
    again.close()
    assert [call["mode"] for call in module.inits] == ["online", "offline", "offline"]
    assert "earlier job of this sweep" in warnings[1]


@pytest.mark.parametrize("broken", ["offline", "log", "finish"])
def test_any_failure_of_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Whatever W&B does, the run goes on and the JSONL file is complete."""
    fake(monkeypatch, broken)
    warnings: list[str] = []
    log = JsonlTracker(tmp_path / "log.jsonl")
    tracker = Trackers(log, WandbTracker("offline", tmp_path, {}, warnings.append))
    for step in range(3):
        tracker.log({"loss": 1.0}, step=step)
    tracker.summary({"mae": 1.0})
    tracker.close()
    assert len(lines(tmp_path / "log.jsonl")) == 3
    assert len(warnings) == 1
    assert f"{broken} is down" in warnings[0]


def test_the_run_names_groups_and_configures_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's jobs are grouped by its folder, and each is finished even when its task fails."""
    module = fake(monkeypatch)
    config = Config(task=Link())
    config.tracking.mode = TrackingMode.offline
    config.tracking.tags = ["a"]

    def job(number: int) -> None:
        with Run.open(config, tmp_path / "sweep" / str(number), group="sweep") as run:
            run.tracker.log({"loss": 1.0}, step=1)
            if number == 1:
                raise MondrianError("no")

    job(0)
    with pytest.raises(MondrianError):
        job(1)
    assert module.exits == [0, 1]
    assert [call["reinit"] for call in (call["settings"] for call in module.inits)] == [
        "create_new",
        "create_new",
    ]
    assert module.inits[0]["id"] != module.inits[1]["id"]
    assert [call["job_type"] for call in module.inits] == ["link", "link"]
    assert [call["group"] for call in module.inits] == ["sweep", "sweep"]
    assert [call["name"] for call in module.inits] == ["sample/0", "sample/1"]
    assert module.inits[0]["project"] == "mondrian_ft"
    assert module.inits[0]["tags"] == ["a"]
    assert module.inits[0]["config"]["lora"]["rank"] == 16


def test_disabled_never_imports_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tracking=none there is the JSONL file and nothing else."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = Config(task=Link())
    config.tracking.mode = TrackingMode.disabled
    with Run.open(config, tmp_path) as run:
        run.tracker.log({"loss": 1.0}, step=1)
    assert json.loads((tmp_path / "run.json").read_text())["warnings"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "training_log.jsonl"]


def test_an_evaluation_is_made_only_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The JSONL file takes no tables and has none made; nor does a W&B that failed."""
    fake(monkeypatch, "log")
    made: list[str] = []

    def tables() -> dict[str, Any]:
        made.append("made")
        return {}

    JsonlTracker(tmp_path / "log.jsonl").show(tables, tmp_path / "report.html")
    warnings: list[str] = []
    tracker = WandbTracker("offline", tmp_path, {}, warnings.append)
    tracker.log({"loss": 1.0}, step=1)
    tracker.close()
    Trackers(tracker).show(tables, tmp_path / "report.html")
    assert made == []
    assert len(warnings) == 1
    assert not (tmp_path / "log.jsonl").exists()


def test_an_evaluation_that_wandb_refuses_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure stops no run, and where it keeps its files is left as it was."""
    fake(monkeypatch)  # which has neither tables nor artifacts
    warnings: list[str] = []
    tracker = WandbTracker("offline", tmp_path, {}, warnings.append)
    tracker.show(dict, tmp_path / "report.html")
    tracker.close()
    assert len(warnings) == 1
    assert "WANDB_DATA_DIR" not in os.environ


def test_the_real_wandb_offline(tmp_path: Path) -> None:
    """With nobody logged in W&B itself asks for nothing and writes into the run folder.

    To be sent later: numbers, the evaluation's tables with their pictures, and its page.
    """
    script = """
import io
from pathlib import Path
from PIL import Image
from mondrian_ft.config import Config
from mondrian_ft.report.tables import Table
from mondrian_ft.registry import Version
from mondrian_ft.run import Run
from mondrian_ft.tasks import Link

with Run.open(Config(task=Link()), Path("here")) as run:
    run.tracker.log({"loss": 1.0}, step=1)
    run.tracker.log({"val_loss": 2.0}, step=1, kind="eval")
    run.tracker.summary({"mae": 0.5})
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(picture, "JPEG")
    Path("report.html").write_text("<p>Helped.")
    arms = Table(["arm", "score_mae", "failed"], [["base", 2.5, None], ["production", None, "no"]])
    shown = Table(["picture", "tuned"], [[picture.getvalue(), "{}"], [None, "{}"]])
    run.tracker.show(lambda: {"arms": arms, "photographs": shown}, Path("report.html"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines(tmp_path / "here" / "training_log.jsonl")) == 2
    (log,) = (tmp_path / "here" / "wandb").glob("offline-run-*/*.wandb")
    # All that is printed is how to send it, typed where it was run.
    (said,) = done.stdout.splitlines()
    assert said.startswith("W&B:      kept on disk; send it with: ")
    assert said.endswith(f"wandb sync {log.parent.relative_to(tmp_path)}")
    kept = {
        entry.path: Path(entry.local_path)
        for record in records(log)
        if record.WhichOneof("record_type") == "artifact"
        for entry in record.artifact.manifest.contents
    }
    arms, shown = (
        json.loads(kept[f"evaluation/{name}.table.json"].read_text())
        for name in ("arms", "photographs")
    )
    assert arms["data"] == [["base", 2.5, None], ["production", None, "no"]]
    types = arms["column_types"]["params"]["type_map"]
    assert "number" in json.dumps(types["score_mae"])  # so that W&B can draw it
    (picture, said), nothing = shown["data"]
    assert nothing == [None, "{}"]
    assert said == "{}"
    with Image.open(kept[picture["path"]]) as opened:
        assert (opened.format, opened.size) == ("JPEG", (40, 30))
    (page,) = (log.parent / "files").glob("media/html/evaluation/report_*.html")
    assert page.read_text() == "<p>Helped."
    assert kept["report.html"].read_text() == "<p>Helped."
    # All that waits to be sent is in the run folder.
    assert all(path.is_relative_to(tmp_path / "here") for path in kept.values())
    assert json.loads((tmp_path / "here" / "run.json").read_text())["warnings"] == []


# --- versions of the registry as artifacts ------------------------------------------------------


class Kept:
    """An artifact, as W&B hands it out."""

    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.type, self.metadata = name, type, metadata
        self.aliases: list[str] = []
        self.files: list[str] = []
        self.saved = 0

    def add_file(self, path: str, name: str, policy: str = "mutable") -> None:
        assert Path(path).is_file()
        self.files.append(f"{name}: {policy}")

    def save(self) -> None:
        self.saved += 1


class ArtifactWandb(FakeWandb):
    """With a store of artifacts that keeps W&B's rules for aliases."""

    Artifact = Kept

    class Error(Exception):
        """What W&B raises where there is no such artifact."""

    def __init__(self, *broken: str) -> None:
        super().__init__(*broken)
        self.store: dict[str, Kept] = {}
        self.used: list[str] = []

    def log_artifact(self, made: Kept, aliases: list[str]) -> None:
        for alias in aliases:
            # W&B counts v0, v1, … for itself and refuses such an alias.
            assert not (alias[0] == "v" and alias[1:].isdigit())
            self.store[f"{made.name}:{alias}"] = made
        made.aliases = list(aliases)

    def use_artifact(self, name: str) -> Kept:
        if self.offline:
            raise TypeError("Cannot use artifact when in offline mode.")
        self.used.append(name)
        if name not in self.store:
            raise self.Error(f"{name} not found")
        return self.store[name]

    def _log_artifact(
        self, made: Kept, aliases: list[str], is_user_created: bool, use_after_commit: bool
    ) -> None:
        assert is_user_created
        assert use_after_commit
        self.log_artifact(made, aliases)
        self.used.append(made.name)


NAME = "sample-ansel"


@pytest.fixture
def published(tmp_path: Path) -> Version:
    folder = tmp_path / "v1"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "manifest.json").chmod(0o444)
    (folder / "weights").mkdir()
    (folder / "weights" / "one").write_text("1")
    return Version("v1", "a" * 64, "2026-11-24", ("candidate",), None, folder, {}, fresh=True)


def artifacts(monkeypatch: pytest.MonkeyPatch, *broken: str) -> ArtifactWandb:
    module = ArtifactWandb(*broken)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_registered_version_is_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Version
) -> None:
    """With its files and facts; the channels are aliases. Promoting it moves aliases alone."""
    module = artifacts(monkeypatch)
    tracker = WandbTracker("online", tmp_path, {}, pytest.fail)
    Trackers(JsonlTracker(tmp_path / "log.jsonl"), tracker).publish(NAME, published)
    tracker.publish(NAME, published._replace(fresh=False, channels=("candidate", "production")))
    tracker.close()
    kept = module.store["sample-ansel:registry-v1"]
    assert (kept.type, kept.files) == (
        "adapter",
        ["manifest.json: immutable", "weights/one: mutable"],
    )
    assert (kept.metadata["hash"], kept.metadata["version"]) == ("a" * 64, "v1")
    assert "path" not in kept.metadata
    assert module.store["sample-ansel:candidate"] is kept
    assert module.used == ["sample-ansel:registry-v1"]
    assert kept.aliases == ["candidate", "production", "registry-v1"]
    assert kept.saved == 1
    assert len(set(module.store.values())) == 1


def test_a_version_that_wandb_never_saw_gets_there_when_it_is_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Version
) -> None:
    """It was registered offline."""
    module = artifacts(monkeypatch)
    tracker = WandbTracker("online", tmp_path, {}, pytest.fail)
    tracker.publish(NAME, published._replace(fresh=False, channels=("production",)))
    tracker.close()
    assert len(module.store["sample-ansel:production"].files) == 2


def test_another_adapter_of_that_name_is_not_promoted_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Version
) -> None:
    """Two machines both have a v1; an alias must not move to the other one's."""
    module = artifacts(monkeypatch)
    warnings: list[str] = []
    tracker = WandbTracker("online", tmp_path, {}, warnings.append)
    tracker.publish(NAME, published)
    tracker.publish(NAME, published._replace(fresh=False, hash="b" * 64))
    tracker.close()
    assert module.store["sample-ansel:registry-v1"].saved == 0
    assert len(warnings) == 1
    assert "sample-ansel:registry-v1 is another adapter there" in warnings[0]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_offline_a_version_waits_with_its_aliases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Version, mode: str
) -> None:
    """Asked for, or because W&B cannot be reached; W&B's own call for inputs refuses offline."""
    module = artifacts(monkeypatch, "online")
    tracker = WandbTracker(mode, tmp_path, {}, lambda sentence: None)
    tracker.publish(NAME, published)
    tracker.publish(NAME, published._replace(fresh=False, channels=("production",)))
    tracker.close()
    assert module.store.keys() == {
        f"sample-ansel:{alias}" for alias in ("registry-v1", "candidate", "production")
    }
    assert module.store["sample-ansel:production"] is not module.store["sample-ansel:candidate"]
    assert module.used == ["sample-ansel"]


def test_promoting_does_not_wait_for_a_wandb_that_nobody_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Version
) -> None:
    """Without a key and without a wish, only a run with numbers keeps versions for later."""
    module = artifacts(monkeypatch)
    tracker = WandbTracker("offline", tmp_path, {}, pytest.fail, versions_alone=False)
    tracker.publish(NAME, published)
    tracker.takes("sample-ansel-split", "split", [published.path / "manifest.json"], {}, "lock-1")
    tracker.close()
    assert module.inits == []
    tracker = WandbTracker("offline", tmp_path, {}, pytest.fail, versions_alone=False)
    tracker.takes("sample-ansel-split", "split", [published.path / "manifest.json"], {}, "lock-1")
    tracker.takes("sample-ansel-split", "split", [published.path / "manifest.json"], {}, "lock-1")
    tracker.log({"loss": 1.0}, step=1)
    tracker.publish(NAME, published)
    tracker.close()
    # What waited for the first number is there, once, as the run's input.
    assert "sample-ansel-split:lock-1" in module.store
    assert module.used == ["sample-ansel-split"]
    assert "sample-ansel:registry-v1" in module.store


# --- a run that is resumed ----------------------------------------------------------------------


def test_a_resumed_training_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id and its name stand beside the checkpoints; online W&B is asked to go on with it."""
    module = fake(monkeypatch)

    def train(folder: str, start: Path | None, project: str = "p") -> None:
        own = tmp_path / folder
        settings = {"project": project, "entity": None, "name": folder}
        tracker = WandbTracker("online", own, settings, pytest.fail)
        tracker.follow(own / "checkpoints", start)
        tracker.log({"loss": 1.0}, step=1)
        tracker.close()

    train("one", None)
    train("two", tmp_path / "one" / "checkpoints" / "step_000002")
    train("three", tmp_path / "two" / "checkpoints" / "step_000004")
    train("other", tmp_path / "two" / "checkpoints" / "step_000004", project="elsewhere")
    ids = [call["id"] for call in module.inits]
    assert len(set(ids)) == 2
    assert ids[:3] == [ids[0]] * 3
    assert [call["name"] for call in module.inits] == ["one", "one", "one", "other"]
    assert {call["resume"] for call in module.inits} == {"allow"}
    kept = json.loads((tmp_path / "three" / "checkpoints" / "wandb.json").read_text())
    assert kept["folders"] == [str(tmp_path / name / "wandb") for name in ("one", "two", "three")]


def test_a_training_without_wandb_before_gets_a_run_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that names no run, or names it in a file that a person broke."""
    module = fake(monkeypatch)
    for content in (None, "{", "[]", '{"id": 1}'):
        folder = tmp_path / "checkpoints"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / "wandb.json").write_text(content)
        tracker = WandbTracker("offline", tmp_path, {"project": "p"}, pytest.fail)
        tracker.follow(tmp_path / "new", folder / "step_000002")
        tracker.log({"loss": 1.0}, step=1)
        tracker.close()
    assert len({call["id"] for call in module.inits}) == 4


# --- the thread ---------------------------------------------------------------------------------


def test_nobody_waits_for_a_wandb_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a number, and not the end of the run but for the seconds that are allowed."""
    import threading

    module = fake(monkeypatch)
    stuck = threading.Event()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: stuck.wait(30))
    monkeypatch.setattr(weights_and_biases, "CLOSING", {"offline": 0.3})
    warnings: list[str] = []
    tracker = WandbTracker("offline", tmp_path, {}, warnings.append)
    monkeypatch.setattr(tracker._worker, "wait", lambda seconds: False)
    started = time.perf_counter()
    for step in range(1000):
        tracker.log({"loss": 1.0}, step=step)
    tracker.close()
    assert time.perf_counter() - started < 5
    stuck.set()
    assert len(warnings) == 1
    assert "has not finished within" in warnings[0]


def test_a_wandb_that_takes_nothing_any_more_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many numbers wait, and then it is left out."""
    import threading

    module = fake(monkeypatch)
    stuck = threading.Event()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: stuck.wait(30))
    monkeypatch.setattr(background, "WAITING", 10)
    warnings: list[str] = []
    tracker = WandbTracker("offline", tmp_path, {}, warnings.append)
    for step in range(100):
        tracker.log({"loss": 1.0}, step=step)
    assert len(warnings) == 1
    assert "no longer takes" in warnings[0]
    stuck.set()
    tracker.close()


# --- TensorBoard --------------------------------------------------------------------------------


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    """Read back from its event file: length (8 bytes), checksum (4), event, checksum (4)."""
    event: Any = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    config = Config(task=Link())
    config.tracking.mode = TrackingMode.disabled
    config.tracking.tensorboard = True
    with Run.open(config, tmp_path) as run:
        run.tracker.log({"loss": 1.0, "monitored": None}, step=1)
        run.tracker.log({"loss": 0.5}, step=2)
        run.tracker.log({"val_loss": 2.0}, step=2, kind="eval")
        run.tracker.summary({"tuned/score_mae": 0.25, "verdict": "better"})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        made = event.FromString(data[at + 12 : at + 12 + length])
        found += [(value.tag, made.step, value.simple_value) for value in made.summary.value]
        at += length + 16
    assert found == [
        ("train/loss", 1, 1.0),
        ("train/loss", 2, 0.5),
        ("eval/val_loss", 2, 2.0),
        ("summary/tuned/score_mae", 0, 0.25),
    ]
    assert json.loads((tmp_path / "run.json").read_text())["warnings"] == []


def test_tensorboard_that_is_not_installed_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on; what to install is said."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = Config(task=Link())
    config.tracking.mode = TrackingMode.disabled
    config.tracking.tensorboard = True
    with Run.open(config, tmp_path) as run:
        run.tracker.log({"loss": 1.0}, step=1)
        run.tracker.log({"loss": 0.5}, step=2)
    (warning,) = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert "pip install 'mondrian_ft[tensorboard]'" in warning
    assert len(lines(tmp_path / "training_log.jsonl")) == 2
