"""The model's process is watched and replaced, and every ask ends, whatever becomes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft import registry
from mondrian_ft.serving import wire
from mondrian_ft.serving.protocol import Answer, Ask, Event, Failure, Fault, Piece, State, Status
from mondrian_ft.serving.supervisor import AHEAD, Limits, Supervisor
from mondrian_ft.serving.wire import Setup

from .engines import Bench, make_ask, said, save_adapter

PRETENDED = Path(__file__).with_name("pretended.py")
QUICK = Limits(silence=5.0, stuck=5.0, loading=30.0, stopping=10.0, backoff=0.02, attempts=3)
NAME = "tiny-ansel"


def run(test: Callable[[], Coroutine[Any, Any, None]], seconds: float = 30.0) -> None:
    """Run an asynchronous test, for so long at the most."""
    asyncio.run(asyncio.wait_for(test(), seconds))


@asynccontextmanager
async def pretended(how: str = "well", **options: Any) -> AsyncIterator[Supervisor]:
    """A supervisor of a process without a model, which is gone afterwards."""
    setup = Setup("none", "none", 1, 2, max_rows=options.pop("max_rows", 4))
    options = {"limits": QUICK, **options}
    one = Supervisor(setup, command=(sys.executable, str(PRETENDED), how), **options)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


def ask(name: str, milliseconds: int = 1, **changes: Any) -> Ask:
    return Ask(name, b"picture", f"text of {name}", "base", max_tokens=milliseconds, **changes)


async def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for a condition, for far longer than it takes on a quiet machine."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


async def events(one: Supervisor, what: Ask) -> list[Event]:
    return [event async for event in one.ask(what)]


async def end(one: Supervisor, what: Ask) -> Answer | Failure:
    """The answer or failure, which is the last event and the only one of its kind."""
    *pieces, last = await events(one, what)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(last, Answer | Failure)
    return last


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- with a pretended process -----------------------------------------------------------------


def test_importing_the_supervisor_imports_no_mlx() -> None:
    """Or the HTTP process would hold a GPU, and die of what kills the model."""
    code = "import sys, mondrian_ft.serving.supervisor; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    tops = {name.split(".")[0] for name in done.stdout.split()}
    assert not tops & {"mlx", "mlx_vlm", "transformers", "numpy", "PIL"}


def test_asks_are_answered_and_the_process_ends_with_the_service() -> None:
    async def test() -> None:
        async with pretended() as one:
            assert one.status().state is State.loading
            assert (await one.settled(10)).state is State.ready
            ends = await asyncio.gather(*(end(one, ask(f"a{n}", 20)) for n in range(12)))
            assert [e.text for e in ends if isinstance(e, Answer)] == [
                f"text of a{n}" for n in range(12)
            ]
            pid = one.status().facts["pid"]
        assert one.status().state is State.stopping
        assert not alive(pid)
        failure = await end(one, ask("late"))
        assert isinstance(failure, Failure)
        assert failure.fault is Fault.worker

    run(test)


def test_asks_before_it_is_ready_wait() -> None:
    async def test() -> None:
        async with pretended() as one:
            assert isinstance(await end(one, ask("early")), Answer)

    run(test)


def test_the_queue_has_a_bound() -> None:
    """Whoever has no answer yet counts, as in the HTTP process; one more is refused at once."""

    async def test() -> None:
        async with pretended(max_rows=2, max_queue=9) as one:
            await one.settled(10)
            tasks = [asyncio.create_task(end(one, ask(f"a{n}", 300))) for n in range(9)]
            await asyncio.sleep(0.05)
            assert one.status().queued == 9 - 2 - AHEAD
            refused = await end(one, ask("one more"))
            assert isinstance(refused, Failure)
            assert refused.fault is Fault.busy
            assert "9 asks are waiting or under way" in refused.sentence
            assert all(isinstance(e, Answer) for e in await asyncio.gather(*tasks))
            assert isinstance(await end(one, ask("one more")), Answer)

    run(test)


def test_two_asks_of_one_id_are_a_mistake() -> None:
    async def test() -> None:
        async with pretended() as one:
            first = asyncio.create_task(end(one, ask("a", 200)))
            while not one._entries:
                await asyncio.sleep(0)
            with pytest.raises(ValueError, match="unique"):
                await end(one, ask("a"))
            await first

    run(test)


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_who_goes_away_stops_the_generation(how) -> None:
    """Closing the iterator, or cancelling the task that reads it; the place is free again."""

    async def test() -> None:
        async with pretended(max_rows=1) as one:
            await one.settled(10)
            if how == "closed":
                stream = one.ask(ask("a", 60_000, stream=True))
                assert isinstance(await anext(stream), Piece)
                await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
            else:
                task = asyncio.create_task(end(one, ask("a", 60_000)))
                await until(lambda: one._sent)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await until(lambda: not one._sent and not one._entries)

    run(test)


def test_a_deadline_ends_the_waiting() -> None:
    """Under way or still waiting."""

    async def test() -> None:
        async with pretended(max_rows=1) as one:
            await one.settled(10)
            started = time.monotonic()
            many = [ask(f"a{n}", 60_000, deadline=0.3) for n in range(1 + AHEAD + 2)]
            ends = await asyncio.gather(*(end(one, each) for each in many))
            assert {e.fault for e in ends if isinstance(e, Failure)} == {Fault.deadline}
            assert 0.25 < time.monotonic() - started < 15, "not the minute that they would take"
            assert isinstance(await end(one, ask("next")), Answer)

    run(test)


def test_a_process_that_dies_at_once_is_given_up() -> None:
    """After some attempts, with the reason; whoever waits is told."""

    async def test() -> None:
        async with pretended("dies") as one:
            waiting = asyncio.create_task(end(one, ask("a")))
            status = await one.settled(20)
            assert status.state is State.failed
            assert "ended 3 times in a row" in status.reason
            assert "code 7" in status.reason
            assert status.restarts == 2
            for failure in (await waiting, await end(one, ask("b"))):
                assert isinstance(failure, Failure)
                assert failure.fault is Fault.worker
                assert "code 7" in failure.sentence

    run(test)


def test_a_process_that_says_why_is_believed_at_once() -> None:
    """A wrong adapter does not get right by starting again."""

    async def test() -> None:
        async with pretended("refuses") as one:
            status = await one.settled(10)
            assert status.state is State.failed
            assert status.reason == "adapter x does not prove itself"
            assert status.restarts == 0

    run(test)


@pytest.mark.parametrize(
    ("how", "limits", "reason"),
    [
        ("silent", replace(QUICK, silence=0.3), "silent for 0.3 seconds"),
        ("stuck", replace(QUICK, stuck=2.0), "stood still for 100 seconds"),
    ],
)
def test_a_process_that_hangs_is_replaced(how, limits, reason) -> None:
    async def test() -> None:
        async with pretended(how, limits=limits) as one:
            await until(lambda: one.status().state is State.failed)
            assert reason in one.status().reason

    run(test)


def test_asks_of_a_process_that_died_are_asked_again(tmp_path) -> None:
    """Whoever waits does not notice."""

    async def test() -> None:
        async with pretended(f"once:{tmp_path / 'mark'}") as one:
            await one.settled(10)
            ends = await asyncio.gather(*(end(one, ask(f"a{n}", 30)) for n in range(10)))
            assert all(isinstance(e, Answer) for e in ends)
            assert one.status().restarts == 1

    run(test)


def test_what_was_told_in_part_is_not_told_again() -> None:
    """Its text would begin anew in the midst of what was shown."""

    async def test() -> None:
        async with pretended() as one:
            await one.settled(10)
            shown = one.ask(ask("shown", 60_000, stream=True))
            assert isinstance(await anext(shown), Piece)
            other = asyncio.create_task(end(one, ask("other", 400)))
            await until(lambda: "other" in one._sent)
            assert one.pid is not None
            os.kill(one.pid, signal.SIGKILL)
            (failure,) = [event async for event in shown]
            answer = await other
            assert isinstance(failure, Failure)
            assert failure.fault is Fault.worker
            assert isinstance(answer, Answer)

    run(test)


def test_an_ask_that_kills_every_process_fails() -> None:
    """And takes nobody with it who had not been sent."""

    async def test() -> None:
        async with pretended("poisoned", max_rows=1) as one:
            await one.settled(10)
            failure = await end(one, ask("a"))
            assert isinstance(failure, Failure)
            assert failure.fault is Fault.worker

    run(test)


def test_stopping_lets_what_is_under_way_end() -> None:
    async def test() -> None:
        async with pretended() as one:
            await one.settled(10)
            task = asyncio.create_task(end(one, ask("a", 400)))
            await until(lambda: one._sent)
            await one.stop()
            assert isinstance(await task, Answer)

    run(test)


# --- with the real process --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(lab, tmp_path_factory) -> tuple[Setup, Path]:
    """The tiny model with a registry of one adapter; and another adapter's directory."""
    from mondrian_ft.model import lora

    folder = tmp_path_factory.mktemp("served")
    first = save_adapter(lab, lab.base, folder / "first")
    second = save_adapter(lab, lab.base, folder / "second", seed=9, rank=2)
    lora.detach(lab.base.model)
    registry.register(folder / "registry", NAME, first, facts={})
    setup = Setup(
        str(lab.model_dir),
        "tiny",
        lab.settings.min_pixels,
        lab.settings.max_pixels,
        arms=("candidate",),
        registry_root=str(folder / "registry"),
        registry_name=NAME,
        max_rows=4,
        max_tokens=400,
    )
    return setup, second


@asynccontextmanager
async def real(setup: Setup, **options: Any) -> AsyncIterator[Supervisor]:
    one = Supervisor(setup, limits=QUICK, **options)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


@pytest.mark.slow
def test_the_real_process_says_what_each_arm_says_alone(lab, base, tiny) -> None:
    """Through the socket, streamed and whole, the channel moved in between."""
    setup, second = tiny
    root = Path(str(setup.registry_root))
    bench = Bench(lab, base, root=root, name=NAME, max_tokens=400)
    asks = [
        make_ask(n, ("base", "candidate")[n % 2], constrained=n % 3 == 0, stream=n % 2 == 0)
        for n in range(10)
    ]
    expected = said(bench.alone(asks))

    async def test() -> None:
        async with real(setup) as one:
            status = await one.settled(60)
            assert status.state is State.ready, status
            assert {(i.arm, i.version) for i in status.arms} == {
                ("base", None),
                ("candidate", "v1"),
            }
            found = await asyncio.gather(*(events(one, each) for each in asks))
            for each, told in zip(asks, found, strict=True):
                *pieces, last = told
                assert isinstance(last, Answer)
                assert said({last.id: last}) == {last.id: expected[last.id]}
                if each.stream:
                    assert "".join(p.text for p in pieces if isinstance(p, Piece)) == last.text
            registry.register(root, NAME, second, facts={})
            moved = await end(one, asks[1])
            assert isinstance(moved, Answer)
            assert moved.identity.version == "v2"
            assert moved.text != expected["ask1"][0]

    run(test, 300)
    after = said(bench.alone([asks[1]]))
    assert after["ask1"][-1].version == "v2"
    bench.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_is_replaced_and_nothing_is_lost(lab, base, tiny, how) -> None:
    """Whoever asked gets the answer that the arm gives alone; nobody is left waiting."""
    setup, _ = tiny
    bench = Bench(lab, base, max_tokens=400)
    asks = [make_ask(n, max_tokens=300) for n in range(8)]
    expected = said(bench.alone(asks))
    bench.engine.close()

    async def test() -> None:
        async with real(setup) as one:
            await one.settled(60)
            first = one.pid
            assert first is not None
            tasks = [asyncio.create_task(end(one, each)) for each in asks]
            await until(lambda: one.status().running)
            os.kill(first, how)
            ends = await asyncio.gather(*tasks)
            assert said({e.id: e for e in ends}) == expected
            assert one.status().restarts == 1
            assert one.pid != first
            assert not alive(first)

    run(test, 300)


@pytest.mark.slow
def test_sigterm_lets_the_process_answer_what_it_has(tiny) -> None:
    """A system that stops processes by group does not lose what is under way."""
    setup, _ = tiny

    async def test() -> None:
        async with real(setup) as one:
            await one.settled(60)
            tasks = [
                asyncio.create_task(end(one, make_ask(n, max_tokens=200, stream=True)))
                for n in range(3)
            ]
            await until(lambda: one.status().running == 3 or any(task.done() for task in tasks))
            assert one.pid is not None
            os.kill(one.pid, signal.SIGTERM)
            assert all(isinstance(e, Answer) for e in await asyncio.gather(*tasks))

    run(test, 300)


@pytest.mark.slow
def test_an_arm_that_is_not_there_fails_the_start(tiny) -> None:
    """With the reason, and without a second try."""
    setup, _ = tiny

    async def test() -> None:
        async with real(replace(setup, arms=("production",))) as one:
            status = await one.settled(60)
            assert status.state is State.failed
            assert "The arm production cannot answer" in status.reason
            assert status.restarts == 0

    run(test, 300)


@pytest.mark.slow
def test_the_process_goes_when_its_service_is_gone(tiny, tmp_path) -> None:
    """Even if that was killed and could tell nobody."""
    setup, _ = tiny
    code = f"""
import asyncio
from mondrian_ft.serving.supervisor import Supervisor
from mondrian_ft.serving.wire import Setup

async def main():
    one = Supervisor({setup!r})
    await one.start()
    await one.settled(60)
    print(one.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    service = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    try:
        pid = int(service.stdout.readline())
        assert alive(pid)
    finally:
        service.kill()
        service.wait()
        service.stdout.close()
    by = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < by, "it outlived its service"
        time.sleep(0.02)


def test_a_cancellation_that_comes_with_a_heartbeat_is_heard() -> None:
    """It was lost now and then: a service that was told to stop waited for ever."""

    async def both_at_once() -> bool:
        one = Supervisor(wire.Setup("none", "none", 1, 2))
        reader = asyncio.StreamReader()
        following = asyncio.create_task(one._follow(reader))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reader.feed_data(wire.pack(wire.Beat(Status(State.ready), 0.0)))
        following.cancel()
        await asyncio.wait([following], timeout=5)
        return following.cancelled()

    assert asyncio.run(both_at_once())
