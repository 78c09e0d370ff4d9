"""Several processes train one adapter: the same update as one process, and no wait without end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mondrian_ft.data.batches import collate
from mondrian_ft.errors import PeerLost
from mondrian_ft.launched import ONLY, Launched, address, launched
from mondrian_ft.model import lora
from mondrian_ft.model.backend import mx
from mondrian_ft.run import _sigterm_interrupts  # pyright: ignore[reportPrivateUsage]
from mondrian_ft.training.parallel import World
from mondrian_ft.training.trainer import _stop_requested  # pyright: ignore[reportPrivateUsage]

from . import together

WORKER = Path(together.__file__)
PATH = os.pathsep.join([str(WORKER.parents[1]), *sys.path])


def start(folder: Path, count: int, *words: object, **options: Any) -> tuple[str, str]:
    """Launch the worker."""
    given = [json.dumps(options)] if options else []
    command = [sys.executable, WORKER, *words, *given]
    return together.launch(folder, count, *command, PYTHONPATH=PATH)


@pytest.fixture
def model(lab, tmp_path) -> Path:
    """The tiny model where the worker looks for it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tiny").symlink_to(lab.model_dir, target_is_directory=True)
    return tmp_path / "run"


def told(folder: Path, rank: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The figures a process saw, and its adapter at the end."""
    figures = json.loads((folder / f"told{rank}.json").read_text())
    with np.load(folder / f"weights{rank}.npz") as found:
        return figures, dict(found)


def check_equal(lab, base, folder: Path, count: int, tmp_path: Path, **options: Any) -> None:
    """One process with the same updates gives the same figures and weights, to float tolerance."""
    alone = together.train(lab, base, tmp_path, **options).told
    weights = lab.weights(base)
    lora.detach(base.model)
    figures, mine = told(folder)
    for name in ("loss", "norm", "val"):
        assert figures[name] == pytest.approx(alone[name], rel=2e-5), name
    assert figures["right"] == alone["right"]
    for name, value in weights.items():
        # AdamW's first updates are nearly the gradient's sign, so compare where it is not tiny.
        assert np.quantile(np.abs(value - mine[name]), 0.99) < 5e-5, name
    for rank in range(1, count):
        theirs = told(folder, rank)
        assert theirs[0] == figures
        # Bit for bit, or the processes would drift apart.
        assert all(np.array_equal(mine[name], theirs[1][name]) for name in mine)


def test_two_processes_train_as_one_does(lab, base, model, tmp_path) -> None:
    """Gradients are weighted by tokens, updates of fewer rows than processes among them."""
    out, err = start(model, 2, "train", model)
    assert (model / "told0.json").is_file(), out + err
    check_equal(lab, base, model, 2, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"plus": 4.0}], ids=str)
def test_four_processes_train_as_one_does(lab, base, model, tmp_path, options) -> None:
    """Optimizers that take arrays one by one as well; they are joined for the sum."""
    out, err = start(model, 4, "train", model, **options)
    assert (model / "told3.json").is_file(), out + err
    check_equal(lab, base, model, 4, tmp_path, **options)


@pytest.mark.full
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_goes_on_as_if_never_stopped(lab, model, tmp_path, dropout) -> None:
    """The others get the first one's checkpoint; each draws the dropout it would have drawn."""
    other = tmp_path / "whole"
    other.mkdir()
    (other / "tiny").symlink_to(lab.model_dir, target_is_directory=True)
    start(other, 2, "train", other, dropout=dropout, max_steps=4)
    start(model, 2, "train", model, dropout=dropout, max_steps=2)
    out, err = start(model, 2, "train", model, dropout=dropout, max_steps=4)
    for rank in (0, 1):
        whole, resumed = told(other, rank), told(model, rank)
        assert whole[0]["loss"][2:] == resumed[0]["loss"], out + err
        assert all(np.array_equal(whole[1][name], resumed[1][name]) for name in whole[1])


def test_processes_that_were_given_different_things_are_refused(tmp_path) -> None:
    out, _ = start(tmp_path, 2, "differ", tmp_path)
    for rank in (0, 1):
        assert (
            f"rank {rank}: PeersDiffer: process 1 of 2 would train something else: lora.rank is 8 "
            "there and 4 in process 0; give every process the same command"
        ) in out


def test_the_others_learn_of_a_death(tmp_path) -> None:
    """Before mlx 0.32.4 they waited without end (ml-explore/mlx 3862)."""
    out, err = start(tmp_path, 2, "alone", tmp_path)
    assert "rank 0: PeerLost: another process of this run has failed or can no longer" in out, err


def test_one_that_stays_silent_is_not_waited_for_without_end(tmp_path) -> None:
    """A machine that sleeps closes no connection."""
    out, err = start(tmp_path, 2, "alone", tmp_path, silent=True, timeout=3.0)
    assert "process 0: error: the other processes of this run have not answered for 3 s" in err, out
    assert "raise trainer.peer_timeout" in err


def alone(folder: Path, rank: int, *ports: int, **options: Any) -> str:
    """What a process says whose launcher started no other; it ends as one that failed."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    done = subprocess.run(
        [sys.executable, WORKER, "alone", folder, json.dumps(options)],
        env={**os.environ, "PYTHONPATH": PATH, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done
    return done.stdout


def test_a_port_in_use_is_named(tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = alone(tmp_path, 0, port, port + 1)
    assert (
        f"PeerLost: cannot listen for the others at 127.0.0.1:{port} (Address already in use); if "
        "the port is another program's, give mlx.launch another --starting-port"
    ) in told


def test_a_first_one_whose_others_never_come_gives_up(tmp_path) -> None:
    """It waited without end: MLX holds Python's lock meanwhile, and the watch was a thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = alone(tmp_path, 0, port, port + 1, timeout=1.0)
    assert "PeerLost: the other processes of this run have not answered for 1 s, before the" in told
    assert "raise trainer.peer_timeout" in told


@pytest.mark.full
def test_one_that_was_started_alone_says_whom_it_misses(tmp_path) -> None:
    """MLX tries for half a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        told = alone(tmp_path, 1, port, port + 1)
    assert f"PeerLost: cannot reach process 0 of 2 at 127.0.0.1:{port}, tried for " in told
    assert "(Connection refused): it was not started, has ended, or a firewall" in told


@pytest.fixture
def heeding() -> Iterator[None]:
    """Puts back what SIGTERM did."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("rank", "aloud"), [(0, False), (1, False), (3, True)])
@pytest.mark.usefixtures("heeding")
def test_a_loss_is_told_in_full_and_by_the_last_too(monkeypatch, rank, aloud) -> None:
    """The launcher stops the rest a second after one is gone: a run was closed half, and silent."""

    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(mx.distributed, "all_gather", lost)
    world = World(Launched(rank, 4), group=object())
    with pytest.raises(PeerLost) as told, _sigterm_interrupts(), _stop_requested():
        world.meet()
    assert told.value.aloud is aloud
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_are_the_whole_update(lab, base, count) -> None:
    """Every row once, in micro-batches no larger than one process's, or none for some."""
    examples = lab.examples(7)
    batches = [collate(examples, rows, base.pad_token) for rows in ((4, 1, 6), (0, 2, 3), (5,))]
    rows: list[int] = []
    for rank in range(count):
        world = World(Launched(rank, count), group=object())
        most = world.most(3, 3)
        shares = world.share(batches, examples, most, base.pad_token)
        assert all(len(share.rows) <= most for share in shares)
        assert sum(len(share.rows) for share in shares) in (7 // count, 7 // count + 1)
        rows += [row for share in shares for row in share.rows]
    assert sorted(rows) == list(range(7))
    assert World().share(batches, examples, 3, base.pad_token) is batches


def test_who_one_is_stands_in_the_launchers_environment(tmp_path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    assert launched({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}) == Launched(1, 2)
    assert launched({"MLX_RANK": "2", "MLX_WORLD_SIZE": "4"}) == Launched(2, 4)
    assert launched({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}) == Launched(1, 2)
    hosts.write_text("\n")  # mlx.launch -n 1
    assert launched({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) == ONLY
    assert launched({}) == ONLY
    assert ONLY.first


def test_where_a_process_listens_stands_there_too(tmp_path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    assert address(1, {"MLX_HOSTFILE": str(hosts)}) == "127.0.0.1:2"
    assert address(2, {"MLX_HOSTFILE": str(hosts)}) == "an unknown address"
    assert address(0, {}) == "an unknown address"
