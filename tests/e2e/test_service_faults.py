"""The real service under load while its model's process dies, stands still, or changes adapters.

Every answer is held to what its arm gives when it is asked alone: the text, the hash, the name.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mondrian_ft import registry
from mondrian_ft.sample import sample_data

from .conftest import Finished, read_json, succeed
from .service import Serving, serving, until

pytestmark = pytest.mark.full
NAME = "sample-ansel"
ARMS = ("base", "v1", "v2")
OPEN = "SELECT count(*) FROM jobs WHERE status = 'analyzing' AND generated_by IS NOT NULL"
"""The service's own open jobs: the sample has some of its users', and who answers an open one is
not known yet, so that ``model_used`` would find none."""


@dataclass(frozen=True)
class World:
    """A folder with a registry (v1 in production, v2 a candidate), a database and photographs."""

    cwd: Path
    database: Path
    pictures: list[Path]
    hashes: dict[str, str | None]


@pytest.fixture(scope="module")
def world(sample_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> World:
    cwd = tmp_path_factory.mktemp("faults")
    data = sample_run.folder / "data"
    second = cwd / "second"
    words = (f"data.output_dir={data}", f"task.output_dir={second}", "tracking=none")
    succeed("task=train", "trainer.max_steps=40", "trainer.seed=1", *words, cwd=cwd)
    root = cwd / "outputs" / "registry"
    registry.register(root, NAME, sample_run.adapter, facts={}, channel="production")
    registry.register(root, NAME, second, facts={})
    database = cwd / "mondrian.db"
    shutil.copy(sample_data(0, cwd / "rendered").db_path, database)
    succeed("task=migrate", f"task.db_path={database}", "tracking=none", cwd=cwd)
    rows = read_json(data / "training_data_ansel_test.json")
    hashes = {
        "base": None,
        "v1": read_json(sample_run.adapter / "manifest.json")["hash"],
        "v2": read_json(second / "manifest.json")["hash"],
    }
    pictures = list(dict.fromkeys(Path(row["image_path"]) for row in rows))[:4]
    return World(cwd, database, pictures, hashes)


@pytest.fixture
def service(world: World) -> Iterator[Serving]:
    words = (
        "task.adapter=production",
        "task.model_mode=ab_test",
        f"task.db_path={world.database}",
        "serve.max_queue=200",
    )
    with serving(world.cwd, *words) as running:
        yield running


def ask(service: Serving, picture: Path, **fields: str) -> httpx.Response:
    files = {"image": (picture.name, picture.read_bytes())}
    return httpx.post(f"{service.url}/analyze", files=files, data=fields, timeout=180)


@pytest.fixture(scope="module")
def alone(world: World) -> dict[tuple[str, str], str]:
    """What each arm says of each photograph when nothing else is asked."""
    texts = {}
    with serving(world.cwd, "task.adapter=production") as quiet:
        until(lambda: httpx.get(f"{quiet.url}/health").status_code == 200, "the model")
        for arm in ARMS:
            for picture in world.pictures:
                answer = ask(quiet, picture, version=arm)
                assert answer.status_code == 200, answer.text
                texts[arm, picture.name] = answer.json()["raw"]
        assert quiet.stop() == 0
    assert len(set(texts.values())) == len(texts), "the arms can be told apart"
    return texts


@dataclass(frozen=True)
class Answered:
    """One request's answer, and how often it was refused before."""

    picture: Path
    user: str
    body: dict[str, Any]
    refused: int


class Crowd:
    """Sixteen clients that ask until every request has its answer.

    There are ``count`` requests, or as many as there can be until `enough`.
    """

    def __init__(
        self, service: Serving, world: World, count: int | None = None, **fields: str
    ) -> None:
        self.service, self.world, self.fields = service, world, fields
        self.answers: list[Answered] = []
        self.problems: list[str] = []
        self._asked = 0
        self._count = count
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(16)
        self._futures = [self._pool.submit(self._keep_asking) for _ in range(16)]

    def _keep_asking(self) -> None:
        while True:
            with self._lock:
                n = self._asked
                if self.problems or n == self._count:
                    return
                self._asked += 1
            pictures = self.world.pictures
            self._ask(pictures[n % len(pictures)], f"person-{n % 8}")

    def _ask(self, picture: Path, user: str) -> None:
        for refused in range(1000):
            answer = ask(self.service, picture, user=user, **self.fields)
            if answer.status_code == 200:
                self.answers.append(Answered(picture, user, answer.json(), refused))
                return
            if answer.status_code != 503 or "retry-after" not in answer.headers:
                self.problems.append(answer.text)
                return
            threading.Event().wait(0.1)
        self.problems.append(f"{picture.name} was never answered")

    def having(self, count: int) -> None:
        """Wait until so many have been answered."""
        until(lambda: len(self.answers) >= count or self.problems, f"{count} answers")

    def answered_by(self, version: str) -> int:
        """How many answers are a version's."""
        return sum(one.body["adapter"]["version"] == version for one in list(self.answers))

    def enough(self) -> None:
        """Ask nothing more; what is under way is waited for by `all`."""
        with self._lock:
            self._count = self._asked

    def all(self) -> list[Answered]:
        for future in self._futures:
            future.result()
        self._pool.shutdown()
        assert not self.problems
        assert len(self.answers) == self._asked, "nothing is lost"
        return self.answers


def check(answers: Sequence[Answered], world: World, alone: dict[tuple[str, str], str]) -> None:
    """Each says what its arm says alone, under its own name, and is in the database so."""
    names = {digest: arm for arm, digest in world.hashes.items()}
    with closing(sqlite3.connect(world.database)) as database:
        kept = {
            row[0]: row[1:]
            for row in database.execute("SELECT id, status, model_used, adapter FROM jobs")
        }
        (left,) = database.execute(OPEN).fetchone()
    for one in answers:
        body = one.body
        arm = names[(body["adapter"] or {}).get("hash")]
        assert body["raw"] == alone[arm, one.picture.name]
        assert body["model_used"].endswith("base" if arm == "base" else "fine_tuned")
        status, used, adapter = kept[body["job_id"]]
        assert (status, used) == ("done", body["model_used"])
        assert (adapter is None) if arm == "base" else adapter == f"{arm}@{world.hashes[arm]}"
    assert left == 0, "no job stays open"
    arms = {}
    for one in answers:
        assert arms.setdefault(one.user, one.body["model_used"]) == one.body["model_used"]


def hurt_in_the_middle(
    service: Serving, world: World, alone: dict[tuple[str, str], str], hurt: Callable[[int], None]
) -> None:
    before = service.worker()
    crowd = Crowd(service, world, 40)
    crowd.having(3)
    hurt(before)
    answers = crowd.all()
    check(answers, world, alone)
    assert len({one.body["model_used"] for one in answers}) == 2, "both arms were asked"
    after = service.worker()
    assert after not in (0, before)
    assert not Path(f"/proc/{before}").exists(), "the old process is gone"
    assert httpx.get(f"{service.url}/model-status").json()["restarts"] >= 1
    assert service.stop() == 0


def test_killed(service: Serving, world: World, alone: dict[tuple[str, str], str]) -> None:
    """As the system kills what takes too much memory: another process, the same answers."""
    hurt_in_the_middle(service, world, alone, lambda pid: os.kill(pid, signal.SIGKILL))


def test_standing_still(service: Serving, world: World, alone: dict[tuple[str, str], str]) -> None:
    """A process that hangs says nothing; its heart is missed, and it is replaced."""
    hurt_in_the_middle(service, world, alone, lambda pid: os.kill(pid, signal.SIGSTOP))


def test_a_channel_moves_under_load(
    service: Serving, world: World, alone: dict[tuple[str, str], str]
) -> None:
    """Promoted and rolled back while sixteen ask: no request is refused, none gets a mixture."""
    crowd = Crowd(service, world, mode="fine_tuned")
    crowd.having(3)
    words = ("task.version=v2", "task.force=true", "task.reason=to see it move", "tracking=none")
    succeed("task=promote", *words, cwd=world.cwd)
    until(lambda: crowd.answered_by("v2") or crowd.problems, "the new one")
    succeed("task=rollback", "tracking=none", cwd=world.cwd)
    before = crowd.answered_by("v1")
    until(lambda: crowd.answered_by("v1") > before or crowd.problems, "the old one again")
    crowd.enough()
    answers = crowd.all()
    check(answers, world, alone)
    assert sum(one.refused for one in answers) == 0, "nothing was dropped"
    assert set(Counter(one.body["adapter"]["version"] for one in answers)) == {"v1", "v2"}
    last = ask(service, world.pictures[0], mode="fine_tuned").json()
    assert (last["adapter"]["version"], last["adapter"]["hash"]) == ("v1", world.hashes["v1"])
    assert service.stop() == 0


def test_stopped_in_the_middle(
    service: Serving, world: World, alone: dict[tuple[str, str], str]
) -> None:
    """SIGTERM: what is under way is answered or told, no job stays open, exit 0."""
    found: list[tuple[Path, httpx.Response]] = []
    pictures = world.pictures[:4]
    threads = [
        threading.Thread(
            target=lambda picture=picture: found.append(
                (picture, ask(service, picture, user=f"late-{picture.stem}"))
            )
        )
        for picture in pictures
    ]
    for thread in threads:
        thread.start()
    metrics = f"{service.url}/metrics"
    until(lambda: "mondrian_asks 4.0" in httpx.get(metrics).text, "four to be under way")
    assert service.stop() == 0
    for thread in threads:
        thread.join()
    assert len(found) == len(pictures), "nobody was left without a word"
    names = {digest: arm for arm, digest in world.hashes.items()}
    for picture, answer in found:
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 200:
            arm = names[(answer.json()["adapter"] or {}).get("hash")]
            assert answer.json()["raw"] == alone[arm, picture.name]
    with closing(sqlite3.connect(world.database)) as database:
        (left,) = database.execute(OPEN).fetchone()
    assert left == 0
