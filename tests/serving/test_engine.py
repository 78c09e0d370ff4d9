"""One base and many adapters answer at the same time, and each ask gets what it gets alone."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mondrian_ft import registry
from mondrian_ft.data.critique import strict_format_error
from mondrian_ft.errors import AdapterError
from mondrian_ft.evaluation import constrain
from mondrian_ft.evaluation.constrain import Constraint
from mondrian_ft.evaluation.generate import Request, generate
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model.qwen3_vl import Qwen3VL
from mondrian_ft.model.running import Running
from mondrian_ft.serving import arms as arms_module
from mondrian_ft.serving.engine import _Bytes
from mondrian_ft.serving.protocol import BASE, Answer, Failure, Fault, Piece

from .engines import PROMPTS, Bench, make_ask, picture, said, save_adapter

NAME = "tiny-ansel"


@pytest.fixture(scope="module")
def folders(lab, tmp_path_factory) -> list[Path]:
    """Adapters of another rank, method and other matrices each."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes: list[dict[str, Any]] = [
        {"seed": 3},
        {"seed": 4, "method": "dora", "rank": 2, "targets": ("q_proj", "v_proj", "down_proj")},
        {"seed": 5, "method": "rslora", "rank": 3, "layers": (1,)},
    ]
    return [
        save_adapter(lab, lab.base, folder / f"adapter{number}", **shape)
        for number, shape in enumerate(shapes)
    ]


@pytest.fixture
def bench(lab, base) -> Iterator[Callable[..., Bench]]:
    """Makes engines, and ends their threads."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(lab, base, **options))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def asks_of(folders: list[Path], count: int, **changes: Any) -> list[Any]:
    """Arms in turn, free and constrained, pictures and prompts of several sizes."""
    arms = [BASE, *map(str, folders)]
    return [
        make_ask(n, arms[n % len(arms)], constrained=n % 3 == 0, **changes) for n in range(count)
    ]


@pytest.mark.parametrize("merge_bytes", [0, 1 << 20])
def test_together_as_alone_whatever_the_arm(lab, base, folders, bench, merge_bytes) -> None:
    """Arms mixed, free and constrained mixed, all at once and one after another."""
    one = bench(folders=folders, merge_bytes=merge_bytes)
    asks = asks_of(folders, 13)
    alone = said(one.alone(asks))
    assert len({answer[0] for answer in alone.values()}) == len(asks)
    assert said(one.together(asks)) == alone
    for turns in (1, 3, 7):
        assert said(one.together(asks, turns=turns)) == alone
    assert said(one.together(asks[::-1], turns=2)) == alone
    few = bench(folders=folders, max_rows=3, merge_bytes=merge_bytes)
    assert said(few.together(asks)) == alone


@pytest.mark.parametrize("merge_bytes", [0, 1 << 20])
def test_an_arm_answers_as_in_an_evaluation(lab, base, folders, bench, merge_bytes) -> None:
    """The adapter in the model by itself, and the batched decoding of evaluations, say the same."""
    one = bench(folders=folders, merge_bytes=merge_bytes)
    asks = asks_of(folders, 8)
    found = one.together(asks)
    one.arms.put_in(one.arms.take(BASE)[1])
    constraint = Constraint.critique(base, None, decimals=True)
    for ask in asks:
        pixels = lab_pixels(lab, base, ask.image)
        (features,) = base.backbone.encode(pixels.patches[None], pixels.grid)
        request = Request(base.prompt_tokens(ask.prompt, pixels.tokens), features, pixels.grid)
        options: dict[str, Any] = {"max_tokens": ask.max_tokens, "batch_size": 1}
        options["constraint"] = constraint if ask.constrained else None
        end = found[ask.id]
        assert isinstance(end, Answer)
        if ask.arm == BASE:
            (expected,) = generate(base, [request], **options)
            assert end.identity.hash is None
        else:
            with adapters.applied(Path(ask.arm), base, probe=one.arms.probe) as adapter:
                (expected,) = generate(base, [request], **options)
            assert end.identity.hash == adapter.hash
        assert (end.text, end.tokens, end.finished) == (
            expected.text,
            expected.tokens,
            expected.finished,
        )
        assert end.identity.arm == ask.arm


@pytest.mark.parametrize("merge_bytes", [0, 1 << 20])
def test_an_arm_sees_with_its_own_tower(lab, base, bench, tmp_path, merge_bytes) -> None:
    """Adapters in the tower and one without, all of the same photograph in one batch: each is
    answered as alone and as in an evaluation, and none is shown another's view."""
    shapes: list[dict[str, Any]] = [
        {"seed": 3, "vision": ("qkv", "linear_fc1")},
        {"seed": 3, "targets": (), "vision": (".*merger.*",), "alpha": 160.0},
        {"seed": 5, "method": "dora", "vision": ("proj",)},
        {"seed": 8},
    ]
    folders = [
        save_adapter(lab, base, tmp_path / f"adapter{number}", **shape)
        for number, shape in enumerate(shapes)
    ]
    one = bench(folders=folders, merge_bytes=merge_bytes)
    arms = [BASE, *map(str, folders)]
    asks = [
        replace(make_ask(n, arm, image=picture(1), prompt=PROMPTS[1]), id=f"ask{n}")
        for n, arm in enumerate([*arms, *arms[::-1]])
    ]
    alone = said(one.alone(asks))
    assert said(one.together(asks)) == alone
    assert said(one.together(asks, turns=2)) == alone
    assert len({answer[0] for answer in alone.values()}) == len(arms)
    one.arms.put_in(one.arms.take(BASE)[1])
    pixels = lab_pixels(lab, base, asks[0].image)
    for ask in asks[1 : len(arms)]:
        with adapters.applied(Path(ask.arm), base, probe=one.arms.probe):
            (features,) = base.backbone.encode(pixels.patches[None], pixels.grid)
            tokens = base.prompt_tokens(ask.prompt, pixels.tokens)
            request = Request(tokens, features, pixels.grid)
            (expected,) = generate(base, [request], max_tokens=24, batch_size=1)
        assert alone[ask.id][0] == expected.text


def lab_pixels(lab: Any, base: Any, image: bytes) -> Any:
    from mondrian_ft.data.pixels import open_photograph, to_pixels

    return to_pixels(open_photograph(io.BytesIO(image)), base.image_processor, lab.settings)


def test_a_constrained_answer_is_a_critique(bench, base, monkeypatch) -> None:
    """With names left to the model, and with names given; a random model says nothing else."""
    short = constrain.Lengths(30, 20, 20, 30, 20, 1)
    monkeypatch.setattr(constrain, "Lengths", lambda: short)
    monkeypatch.setattr(constrain, "MOST_DIMENSIONS", 3)
    free = bench(max_tokens=4000).together([make_ask(0, constrained=True, max_tokens=4000)])
    named = bench(max_tokens=4000, dimensions=("Light", "Focus")).together(
        [make_ask(0, constrained=True, max_tokens=4000)]
    )
    for (end,) in (free.values(), named.values()):
        assert isinstance(end, Answer)
        assert end.finished
        assert strict_format_error(end.text) is None
    (end,) = named.values()
    assert isinstance(end, Answer)
    assert [one["name"] for one in json.loads(end.text)["dimensions"]] == ["Light", "Focus"]


def test_draws_are_a_rows_own(base, folders, bench) -> None:
    """Temperature and seed decide, not the neighbours; a greedy neighbour stays greedy."""
    one = bench(folders=folders)
    asks = [
        make_ask(n, (BASE, str(folders[0]))[n % 2], temperature=(0.0, 1.5, 0.8)[n % 3], seed=n)
        for n in range(9)
    ]
    alone = said(one.alone(asks))
    assert said(one.together(asks)) == alone
    assert said(one.together(asks, turns=2)) == alone
    other = said(one.together([replace(ask, seed=ask.seed + 1) for ask in asks]))
    assert [n for n in range(9) if other[f"ask{n}"] == alone[f"ask{n}"]] == [0, 3, 6]


def test_rows_join_and_leave_without_a_trace(base, bench, monkeypatch) -> None:
    """Places are used again, batches get smaller, columns are dropped, a longer prompt comes late.

    With blocks of four columns all of it happens within a few tokens.
    """
    from mondrian_ft.model import running

    done: set[str] = set()
    plain_grow, plain_resize = Running._grow, Running._resize

    def grow(self: Running) -> None:
        column = self.column
        plain_grow(self)
        done.add("dropped" if self.column < column else "grown")

    def resize(self: Running, places: Any) -> None:
        done.add("smaller" if len(places) < self.places else "larger")
        plain_resize(self, places)

    asks = [make_ask(n, max_tokens=(40, 3, 9, 17)[n % 4]) for n in (0, 2, 3, 1, 5, 8, 4, 7, 6)]
    alone = said(bench().alone(asks))
    monkeypatch.setattr(running, "BLOCK", 4)
    monkeypatch.setattr(running, "PATIENCE", 2)
    monkeypatch.setattr(Running, "_grow", grow)
    monkeypatch.setattr(Running, "_resize", resize)
    short_first = sorted(asks, key=lambda ask: len(ask.prompt))
    for turns in (0, 2, 5, 11):
        one = bench(max_rows=4)
        assert said(one.together(asks, turns=turns)) == alone
        assert said(one.together(short_first, turns=turns)) == alone
    assert done == {"dropped", "grown", "smaller", "larger"}


def test_what_was_cancelled_or_is_overdue_is_computed_no_more(base, folders, bench) -> None:
    """Waiting or under way; the others' answers are what they are without it."""
    one = bench(folders=folders, max_rows=3)
    asks = asks_of(folders[:1], 6, max_tokens=40)
    asks = [replace(ask, arm=BASE) for ask in asks]
    alone = said(one.alone(asks))
    one.events.clear()
    late = replace(asks[5], deadline=0.0)
    for ask in (*asks[:5], late):
        one.engine.submit(ask)
    for _ in range(5):
        one.engine.turn()
    batch = one.engine._batch
    assert batch is not None
    assert batch.rows == 3
    one.engine.cancel("ask1")
    one.engine.cancel("ask4")
    one.engine.cancel("nobody")
    one.engine.turn()
    assert batch.rows == 3  # ask3 has taken the place of ask1
    one.engine.run()
    ends = one.ends()
    faults = {name: end.fault for name, end in ends.items() if isinstance(end, Failure)}
    assert faults == {
        "ask1": Fault.cancelled,
        "ask4": Fault.cancelled,
        "ask5": Fault.deadline,
    }
    rest = {name: end for name, end in ends.items() if name not in faults}
    assert said(rest) == {name: alone[name] for name in rest}
    assert one.engine._batch is None


def test_whoever_goes_away_leaves_the_others_as_they_are(base, folders, bench) -> None:
    """Rows of several arms, until one arm alone is left, and an arm that comes back."""
    one = bench(folders=folders, merge_bytes=1 << 20)
    asks = asks_of(folders, 8, max_tokens=40)
    alone = said(one.alone(asks))
    one.events.clear()
    for ask in asks[:6]:
        one.engine.submit(ask)
    for _ in range(9):
        one.engine.turn()
    for name in ("ask0", "ask1", "ask3", "ask4", "ask5"):
        one.engine.cancel(name)
    for _ in range(12):
        one.engine.turn()
    assert [job.ask.id for job in one.engine._jobs.values()] == ["ask2"]
    assert one.arms._inside is one.arms.take(asks[2].arm)[1]
    for ask in asks[6:]:
        one.engine.submit(ask)
    one.engine.run()
    ends = one.ends()
    assert sum(isinstance(end, Failure) for end in ends.values()) == 5
    rest: dict[str, Answer | Failure] = {
        name: end for name, end in ends.items() if isinstance(end, Answer)
    }
    assert said(rest) == {name: alone[name] for name in ("ask2", "ask6", "ask7")}


def test_a_deadline_stops_an_answer_that_is_under_way(base, bench) -> None:
    """A long answer ends within a turn of its deadline."""
    one = bench(max_tokens=100_000 // 64)
    one.engine.submit(make_ask(0, max_tokens=None, deadline=0.3, constrained=True))
    started = time.monotonic()
    one.engine.run()
    (end,) = one.ends().values()
    assert isinstance(end, Failure)
    assert end.fault is Fault.deadline
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("arms", [1, 3])
def test_numbers_that_are_not_finite_fail_their_row_alone(
    base, folders, bench, monkeypatch, arms
) -> None:
    """And whoever gets its place afterwards finds nothing of it there, whosever rows they are."""
    from mondrian_ft.model.backend import mx
    from mondrian_ft.model.qwen3_vl import VisionFeatures

    one = bench(max_rows=3, folders=folders)
    names = [BASE, *map(str, folders)][:arms]
    asks = [make_ask(n, names[n % arms]) for n in range(6)]
    alone = said(one.alone(asks))
    plain = one.features.get

    def spoiled(photographs: Any) -> Any:
        found = plain(photographs)
        if photographs[0][0] == spoil:
            return [VisionFeatures(found[0].features * mx.nan, found[0].deepstack)]
        return found

    import hashlib

    spoil = hashlib.sha256(asks[1].image).hexdigest()
    monkeypatch.setattr(one.features, "get", spoiled)
    ends = one.together(asks)
    end = ends.pop("ask1")
    assert isinstance(end, Failure)
    assert end.fault is Fault.model
    assert "not finite" in end.sentence
    assert said(ends) == {name: alone[name] for name in ends}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not a picture"),
        (b"Dear sir or madam,", "not a picture"),
        (picture(0)[:400], "cannot be decoded"),
    ],
)
def test_what_is_no_photograph_is_refused_by_name(bench, image, reason) -> None:
    """No path of this machine, and no trace of Python, is in the sentence."""
    one = bench()
    ends = one.together([make_ask(1, image=image or b" "), make_ask(2)])
    end = ends["ask1"]
    assert isinstance(end, Failure)
    assert end.fault is Fault.picture
    assert reason in end.sentence
    assert end.sentence.startswith("The photograph ")
    assert isinstance(ends["ask2"], Answer)


def test_a_picture_that_is_too_small_is_refused(bench) -> None:
    """The 1×1 PNG of a real database."""
    file = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(file, "PNG")
    (end,) = bench().together([make_ask(0, image=file.getvalue())]).values()
    assert isinstance(end, Failure)
    assert end.fault is Fault.picture
    assert "1×1" in end.sentence


def test_a_prompt_that_is_too_long_is_refused(bench, base, monkeypatch) -> None:
    """Prompt, picture and answer must fit the model; a place for a picture is no text."""
    monkeypatch.setattr(base.backbone, "longest", 100)
    one = bench()
    ends = one.together(
        [
            make_ask(0, prompt="far ridge, low light " * 40),
            make_ask(1, prompt="<|image_pad|>"),
            make_ask(2),
        ]
    )
    for name in ("ask0", "ask1"):
        end = ends[name]
        assert isinstance(end, Failure)
        assert end.fault is Fault.prompt
    assert "more than the 100" in ends["ask0"].sentence  # pyright: ignore
    assert isinstance(ends["ask2"], Answer)


def test_pieces_are_the_text(base, folders, bench, monkeypatch) -> None:
    """Put together they are the answer, although characters are split between tokens."""
    from mondrian_ft.serving import engine

    monkeypatch.setattr(engine, "PIECE_EVERY", 0.0)
    one = bench(folders=folders)
    asks = [replace(ask, stream=True, temperature=1.0, seed=3) for ask in asks_of(folders, 8)]
    ends = said(one.together(asks))
    for ask in asks:
        pieces = [e.text for e in one.events if isinstance(e, Piece) and e.id == ask.id]
        assert "".join(pieces) == ends[ask.id][0]
        assert len(pieces) > 3
    assert any("\N{REPLACEMENT CHARACTER}" in answer[0] for answer in ends.values())
    one.together([make_ask(0)])
    assert not [event for event in one.events if isinstance(event, Piece)]


def test_a_photograph_is_seen_once(bench, monkeypatch) -> None:
    """Asked about again, it is neither decoded nor does it go through the tower."""
    from mondrian_ft.serving import engine

    seen: list[str] = []
    plain = Qwen3VL.encode
    plain_open = engine.open_photograph
    monkeypatch.setattr(
        Qwen3VL, "encode", lambda self, *a: (seen.append("tower"), plain(self, *a))[1]
    )
    monkeypatch.setattr(
        engine, "open_photograph", lambda *a: (seen.append("opened"), plain_open(*a))[1]
    )
    one = bench()
    seen.clear()
    first = said(one.alone([make_ask(4)]))
    assert seen == ["opened", "tower"]
    assert said(one.alone([make_ask(4)])) == first
    assert seen == ["opened", "tower"]
    # Its features are gone: it is read again.
    one.features._kept.clear()
    assert said(one.alone([make_ask(4)])) == first
    assert seen == ["opened", "tower"] * 2


def test_times_are_told(bench) -> None:
    """In the order in which they pass."""
    (end,) = bench().together([make_ask(0)]).values()
    assert isinstance(end, Answer)
    seconds = end.seconds
    assert set(seconds) == {"queued", "prefill", "first_token", "total"}
    assert 0 <= seconds["queued"] <= seconds["first_token"] <= seconds["total"]
    assert 0 < seconds["prefill"] < seconds["total"]


# --- arms -------------------------------------------------------------------------------------


def test_adapters_beyond_the_bound_are_loaded_again(base, folders, bench) -> None:
    """The one used longest ago goes, though its rows are under way; nobody notices."""
    alone = said(bench(folders=folders).alone(asks_of(folders, 8)))
    one = bench(folders=folders, most=1)
    assert said(one.together(asks_of(folders, 8))) == alone
    assert len(one.arms._kept) == 1
    assert len(one.arms.identities()) == 2


def test_a_channel_is_followed(base, folders, bench, tmp_path) -> None:
    """Who asks after it moved gets the new version; who asked before keeps the old one."""
    root = tmp_path / "registry"
    registry.register(root, NAME, folders[0], facts={})
    one = bench(root=root, name=NAME)
    asks = [make_ask(n, "candidate") for n in range(4)]
    first = said(one.alone(asks))
    assert {answer[-1].version for answer in first.values()} == {"v1"}
    one.events.clear()
    one.engine.submit(asks[0])
    for _ in range(4):
        one.engine.turn()
    registry.register(root, NAME, folders[1], facts={})
    one.engine.submit(asks[1])
    one.engine.submit(make_ask(2, "v1"))
    one.engine.run()
    ends = said(one.ends())
    assert ends["ask0"] == first["ask0"]
    assert ends["ask1"][-1].version == "v2"
    assert ends["ask1"][0] != first["ask1"][0]
    assert ends["ask2"][:-1] == first["ask2"][:-1]
    assert (ends["ask2"][-1].arm, ends["ask2"][-1].version) == ("v1", "v1")
    known = {(one.arm, one.version) for one in one.arms.identities()}
    assert known == {(BASE, None), ("candidate", "v2"), ("v1", "v1")}


def test_a_version_that_was_changed_is_refused_and_nothing_else_answers(
    base, folders, bench, tmp_path, monkeypatch
) -> None:
    """The old version is in memory, and is not what was asked for."""
    root = tmp_path / "registry"
    registry.register(root, NAME, folders[0], facts={})
    one = bench(root=root, name=NAME)
    said(one.alone([make_ask(0, "candidate")]))
    version = registry.register(root, NAME, folders[1], facts={})
    weights = version.path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + b"\x7f")
    ends = one.together([make_ask(1, "candidate"), make_ask(2, "v1"), make_ask(3, "v9")])
    for name, arm in (("ask1", "candidate"), ("ask3", "v9")):
        end = ends[name]
        assert isinstance(end, Failure)
        assert end.fault is Fault.adapter
        assert end.sentence.startswith(f"The arm {arm} cannot answer: ")
    assert str(version.path) in ends["ask1"].sentence  # pyright: ignore
    assert isinstance(ends["ask2"], Answer)
    weights.write_bytes(whole)
    # Not asked of the disk at every ask, but soon.
    (end,) = one.together([make_ask(1, "candidate")]).values()
    assert isinstance(end, Failure)
    monkeypatch.setattr(arms_module, "FAILURE_KEPT", 0.0)
    (end,) = one.together([make_ask(1, "candidate")]).values()
    assert isinstance(end, Answer)
    assert end.identity.version == "v2"


def test_all_arms_share_one_batch(base, folders, bench, monkeypatch) -> None:
    """Each had its own, and two arms took nearly twice as long as one."""
    steps: list[int] = []
    plain = Running.advance
    monkeypatch.setattr(Running, "advance", lambda self: (steps.append(self.rows), plain(self))[1])
    one = bench(folders=folders)
    asks = [replace(ask, constrained=False) for ask in asks_of(folders, 8, max_tokens=20)]
    said(one.together(asks))
    # One is taken up in each turn, and a turn is one step for all that are under way.
    assert max(steps) == 8
    assert len(steps) == 8 - 1 + 20


def mixed(one: Bench) -> list[Path]:
    """The adapters in the mixture there is."""
    mixture = one.arms._mixture
    return [arm.adapter.folder for arm in mixture.arms if arm.adapter] if mixture else []


def test_one_arm_alone_is_answered_with_its_own_form(base, folders, bench) -> None:
    """Added up, it costs what the base does; the mixture is for several, and is kept for them."""
    one = bench(folders=folders, merge_bytes=1 << 20)
    first, second = str(folders[0]), str(folders[1])
    one.alone([make_ask(0, first), make_ask(1, second), make_ask(2)])
    assert mixed(one) == []
    one.together([make_ask(0, first), make_ask(1)])
    assert mixed(one) == [folders[0]]
    one.together([make_ask(0, first), make_ask(1, second), make_ask(2)])
    assert mixed(one) == folders[:2]
    mixture = one.arms._mixture
    one.together([make_ask(0), make_ask(1, second)])
    assert one.arms._mixture is mixture
    one.alone([make_ask(0, first)])
    assert one.arms._inside is one.arms.take(first)[1]


def test_adapters_long_unused_leave_the_mixture(base, folders, bench, monkeypatch) -> None:
    """It costs more the more adapters it has."""
    one = bench(folders=folders)
    monkeypatch.setattr(arms_module, "RECENT", 0.0)
    for pair in (folders[:2], folders[1:]):
        said(one.together([make_ask(n, str(folder)) for n, folder in enumerate(pair)]))
        assert mixed(one) == pair


def test_an_adapter_that_does_not_prove_itself_in_the_mixture_is_refused(
    base, folders, bench, monkeypatch
) -> None:
    """What answers is what was proved, in this form too; who was under way does not notice."""
    from mondrian_ft.model import answering

    one = bench(folders=folders)
    asks = [make_ask(0, max_tokens=40), make_ask(1, str(folders[0])), make_ask(2)]
    alone = said(one.alone(asks))
    plain = answering.mix

    def wrong(adapters: Any, rows: Any) -> Any:
        layers = plain(adapters, rows)
        layer = next(iter(layers.values()))
        layer.lora_b = layer.lora_b * 0
        return layers

    monkeypatch.setattr(answering, "mix", wrong)
    ends = one.together(asks, turns=3)
    end = ends.pop("ask1")
    assert isinstance(end, Failure)
    assert end.fault is Fault.adapter
    assert str(folders[0]) in end.sentence
    assert said(ends) == {name: alone[name] for name in ends}
    monkeypatch.undo()
    assert said(one.together(asks, turns=3)) == alone


def test_an_asks_own_trouble_is_no_others(base, folders, bench, monkeypatch, capfd) -> None:
    """An error nobody thought of ended the process, and with it every other answer.

    While the prompt is read (short memory is one that can come there), and while a token is added.
    """
    from mondrian_ft.serving import engine

    one = bench(folders=folders)
    asks = [replace(ask, arm=BASE) for ask in asks_of(folders, 6)]
    asks[4] = replace(asks[4], stream=True)
    alone = said(one.alone(asks))
    plain = engine.read_prompts

    def short(base: Any, requests: Any) -> Any:
        if len(requests[0].tokens) == spoil:
            raise RuntimeError("[malloc] Unable to allocate 12345 bytes.")
        return plain(base, requests)

    spoil = alone["ask1"][3]
    hit = {name for name, answer in alone.items() if answer[3] == spoil}
    monkeypatch.setattr(engine, "read_prompts", short)

    def broken(self: Any, tokens: Any) -> str:
        raise UnicodeError("half a letter")

    monkeypatch.setattr(engine._Text, "more", broken)
    ends = one.together(asks)
    failed = {end.id: end for end in ends.values() if isinstance(end, Failure)}
    assert set(failed) == {*hit, "ask4"}
    assert {end.fault for end in failed.values()} == {Fault.model}
    assert "Unable to allocate" in failed["ask1"].sentence
    rest = {name: end for name, end in ends.items() if name not in failed}
    assert said(rest) == {name: alone[name] for name in rest}
    assert one.engine._batch is None
    assert "in broken" in capfd.readouterr().err


def test_an_adapters_refusal_takes_its_own_ask(base, folders, bench, monkeypatch) -> None:
    """It came after the ask had left the queue, and the next one in it was refused."""
    one = bench(folders=folders)

    def refuse(arms: Any) -> None:
        raise AdapterError("it does not prove itself beside the others")

    asks = [make_ask(0), make_ask(1, str(folders[0])), make_ask(2)]
    plain = one.arms.mix
    monkeypatch.setattr(
        one.arms, "mix", lambda arms: refuse(arms) if len(set(arms)) > 1 else plain(arms)
    )
    ends = one.together(asks)
    assert {name for name, end in ends.items() if isinstance(end, Failure)} == {"ask1"}


def test_an_adapter_that_cannot_be_read_is_refused(base, folders, bench, monkeypatch) -> None:
    """The disk's error ended the process, and another one would have read the same disk."""
    one = bench(folders=folders)

    def unreadable(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(adapters, "read", unreadable)
    ends = one.together([make_ask(0), make_ask(1, str(folders[0]))])
    end = ends["ask1"]
    assert isinstance(end, Failure)
    assert end.fault is Fault.adapter
    assert "Permission denied" in end.sentence
    assert isinstance(ends["ask0"], Answer)


def test_only_the_adapter_directories_of_the_start_answer(base, folders, bench) -> None:
    """Or an ask could have any file of the machine opened."""
    one = bench(folders=folders[:1])
    ends = one.together([make_ask(0, str(folders[1])), make_ask(1, "production")])
    assert {end.fault for end in ends.values() if isinstance(end, Failure)} == {Fault.adapter}
    assert len(ends) == 2


def test_an_adapter_that_does_not_prove_itself_is_refused(lab, base, folders, bench, tmp_path):
    """The model is its base afterwards, and the other arms' rows do not notice."""
    import shutil

    damaged = shutil.copytree(folders[0], tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["probe"]["inputs"][0]["tuned"][0] += 1.0
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    one = bench(folders=[folders[0], damaged])
    asks = [make_ask(0), make_ask(1, str(folders[0]))]
    alone = said(one.alone(asks))
    one.events.clear()
    for ask in asks:
        one.engine.submit(ask)
    for _ in range(4):
        one.engine.turn()
    one.engine.submit(make_ask(2, str(damaged)))
    one.engine.run()
    ends = one.ends()
    end = ends.pop("ask2")
    assert isinstance(end, Failure)
    assert end.fault is Fault.adapter
    assert said(ends) == alone


def test_a_photograph_is_named_in_errors() -> None:
    """Not by what Python calls a stream."""
    assert f"{_Bytes(b'')} is" == "the photograph is"


def test_prompts_have_several_lengths() -> None:
    """Or rows would not need their own columns."""
    assert len({len(prompt) for prompt in PROMPTS}) == len(PROMPTS)
    assert len({np.asarray(Image.open(io.BytesIO(picture(n)))).shape for n in range(5)}) == 5
