"""Failures that users of other trainers report, in which nothing looked wrong: each planted here.

A run that is spoilt has to be refused, or to come out right; a falling loss proves neither.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from mondrian_ft.data.batches import TooLong, collate, encode
from mondrian_ft.data.pixels import PixelSettings, count_tokens, open_photograph, to_pixels
from mondrian_ft.errors import AdapterError, MondrianError, TrainingError
from mondrian_ft.evaluation.generate import Request, generate
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import agreement, fuse, lora
from mondrian_ft.model.backend import mx
from mondrian_ft.model.base import load_base
from mondrian_ft.model.features import FeatureStore
from mondrian_ft.model.imports import read_foreign
from mondrian_ft.model.qwen3_vl import VisionFeatures
from mondrian_ft.training import memory, optim, preflight, trial
from tests.serving.engines import Bench, make_ask, said, save_adapter


class Seen:
    """The updates of a run."""

    def __init__(self) -> None:
        self.updates: list[Any] = []

    def on_step(self, state: Any, update: Any) -> None:
        self.updates.append(update)

    def on_eval(self, state: Any) -> None: ...
    def on_end(self, state: Any) -> None: ...


# --- 1: trained without the images, and the loss still fell ------------------------------------


def test_training_without_the_picture_is_refused(lab, base) -> None:
    """mlx-vlm 824: 23 tokens a sample instead of 1,076; the loss fell all the same.

    Planted three times: a chat template that loses the picture, a cache that gives empty features,
    and one that gives every row the same ones.
    """
    examples = lab.examples(2)
    one = examples[0]
    without = one.tokens[one.tokens != base.backbone.image_token]
    lost = one.pixels.tokens
    bare = dataclasses.replace(one, tokens=without, prompt_length=one.prompt_length - lost)
    with pytest.raises(TrainingError, match=f"holds 0 image tokens, but its picture has {lost}"):
        preflight.check(base, [bare], FeatureStore(base.backbone))
    # Should the preflight be passed over, the batch is refused as well.
    trainer = lab.trainer(base, [bare], Path("unused"))
    with pytest.raises(MondrianError, match=f"0 image tokens for a picture of {lost}"):
        trainer.update(trainer.batches.update(1))

    class Empty(FeatureStore):
        def get(self, photographs: Any) -> Any:
            return [
                dataclasses.replace(
                    found,
                    features=found.features * 0,
                    deepstack=tuple(d * 0 for d in found.deepstack),
                )
                for found in super().get(photographs)
            ]

    with pytest.raises(TrainingError, match="not being shown the photographs"):
        preflight.check(base, examples, Empty(base.backbone))

    class Alike(FeatureStore):
        def get(self, photographs: Any) -> Any:
            return [
                VisionFeatures(
                    mx.ones_like(one.features), tuple(mx.ones_like(d) for d in one.deepstack)
                )
                for one in super().get(photographs)
            ]

    with pytest.raises(TrainingError, match="sees that there is a picture, and not which"):
        preflight.check(base, examples, Alike(base.backbone))


# --- 2: truncation dropped image tokens ----------------------------------------------------------


def test_a_row_is_never_cut(lab, base) -> None:
    """trl 5285, LLaMA-Factory 5968: a maximum length cut through the picture, and the loss fell.

    A row over the limit is named and left out. One that something else has cut is refused.
    """
    (row,) = lab.rows(1)
    whole = lab.examples(1)[0]
    limit = len(whole.tokens) - 1
    with pytest.raises(TooLong, match=f"row0 has {len(whole.tokens)} tokens"):
        encode(
            row,
            base,
            base.image_processor,
            lab.settings,
            base.backbone.image_token,
            longest=limit,
        )
    cut = np.delete(whole.tokens, whole.image_start + 1)
    shorter = dataclasses.replace(whole, tokens=cut, prompt_length=whole.prompt_length - 1)
    with pytest.raises(TrainingError, match="image tokens, but its picture has"):
        preflight.check(base, [shorter], FeatureStore(base.backbone))


# --- 3: resume unfroze the base, restarted at step 1, or ended at once ---------------------------


def test_a_resumed_run_goes_on_with_the_adapter_alone(lab, base, tmp_path) -> None:
    """mlx-vlm 2178, mlx-lm 97, ms-swift 6084: 27 times the trained parameters after a resume; or
    the first step again; or none at all.

    A resumed run trains the same tensors, does just the updates that are left, and ends where the
    straight one ended. A base that is not frozen is refused.
    """
    examples = lab.examples(5)

    def start(folder: str, **options: Any) -> tuple[Any, Seen]:
        lora.detach(base.model)
        lab.attach(base, live=False)
        seen = Seen()
        return lab.trainer(base, examples, tmp_path / folder, callbacks=[seen], **options), seen

    straight, seen = start("straight")
    straight.fit()
    trained, weights = trial.attached(base), lab.weights(base)
    assert len(seen.updates) == 6
    first, _ = start("resumed", max_steps=4)
    first.fit()
    second, seen = start("resumed")
    second.checkpointer.restore(second, second.checkpointer.last())
    assert second.state.step == 4
    assert trial.attached(base) == trained
    second.fit()
    assert len(seen.updates) == 2
    assert second.state.step == 6
    assert trial.attached(base) == trained
    assert lab.weights(base).keys() == weights.keys()

    base.backbone.text.norm.unfreeze()
    with pytest.raises(TrainingError, match=r"trained \(64 numbers, language_model\.model\.norm"):
        trial.attached(base)
    base.backbone.text.norm.freeze()
    next(iter(lora.lora_layers(base.model).values())).freeze()
    with pytest.raises(TrainingError, match="2 tensors of the adapter are frozen"):
        trial.attached(base)


# --- 4: an adapter that loaded and changed nothing -----------------------------------------------


def test_an_adapter_that_would_change_nothing_is_refused(lab, base, tmp_path) -> None:
    """vLLM 34186, mlx-lm 1745: a foreign key prefix or ``keys: ["auto"]`` matched no matrix; the
    adapter loaded, and the base answered.

    Also one whose B matrices are all zero, which no key can give away.
    """
    folder = save_adapter(lab, base, tmp_path / "adapter")
    weights = folder / adapters.WEIGHTS
    tensors = load_file(weights)
    foreign = {name.replace("model.language_model.", "model."): v for name, v in tensors.items()}
    save_file(foreign, weights, {"format": "pt"})
    with pytest.raises(AdapterError):
        adapters.load(folder, base)
    assert lora.lora_layers(base.model) == {}
    with pytest.raises(AdapterError, match="tensors are missing"):
        lab.attach(base)
        lora.set_tensors(base.model, {f"text.{n}": v for n, v in lora.tensors(base.model).items()})

    auto = tmp_path / "auto"
    auto.mkdir()
    arrays = {name: np.array(value) for name, value in lora.tensors(base.model).items()}
    save_file(arrays, auto / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["auto"]}
    config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (auto / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="keys names auto"):
        read_foreign(auto)

    lora.detach(base.model)
    with pytest.raises(AdapterError, match="the adapter changes nothing"):
        lab.attach(base, live=False)
        adapters.save(
            tmp_path / "zero",
            base,
            lab.spec(),
            pixels={"fingerprint": "f" * 16},
            prompts=[],
            data_lock="d" * 64,
            facts={},
        )
    assert not (tmp_path / "zero").exists()


# --- 5: adapter, merged model and server disagree ------------------------------------------------


def test_adapter_merged_model_and_server_say_the_same(lab, base, tmp_path) -> None:
    """ms-swift 5430 and 4725, unsloth 1352: 44.5 % against 87 % with two ways of merging.

    One adapter answers the same questions from its directory, merged into a model that is read
    back, and behind the server. A merge at twice the scale, planted, is told from them.
    """
    folder = save_adapter(lab, base, tmp_path / "adapter")
    read = adapters.read(folder)
    asks = [make_ask(number, str(folder)) for number in range(3)]
    ends = Bench(lab, base, folders=[folder]).alone(asks)
    served = [ends[ask.id].text for ask in asks]  # pyright: ignore
    lora.detach(base.model)

    def answers(model: Any) -> list[str]:
        made = []
        for ask in asks:
            pixels = to_pixels(
                open_photograph(io.BytesIO(ask.image)), model.image_processor, lab.settings
            )
            (features,) = FeatureStore(model.backbone).get([(ask.id, pixels)])
            tokens = model.prompt_tokens(ask.prompt, pixels.tokens)
            made.append(Request(tokens, features, pixels.grid))
        return [one.text for one in generate(model, made, max_tokens=24, batch_size=1)]

    untuned = answers(base)
    with adapters.applied(folder, base):
        applied, logits = answers(base), agreement.probe_logits(base)
    distances = []
    for name, spec in (
        ("merged", read.spec),
        ("twice", dataclasses.replace(read.spec, alpha=2 * read.spec.alpha)),
    ):
        (tmp_path / name).mkdir()
        fuse.write_published(tmp_path / name, base, spec=spec, tensors=read.tensors)
        merged = load_base(tmp_path / name)
        apart = agreement.distances(logits, agreement.probe_logits(merged))
        distances.append(max(one.largest for one in apart.values()))
        if name == "merged":
            assert answers(merged) == applied == served != untuned
    assert distances[0] < 1e-3 < 0.1 < distances[1]


# --- 6: every label -100; the mask began at the wrong "assistant" --------------------------------


def test_masks_begin_at_the_answer_and_nowhere_else(lab, base) -> None:
    """unsloth 2900: a prompt that spells the assistant's opening moved the mask; others were
    masked as a whole, and trained on nothing.

    A prompt that quotes the template trains the answer, and just the answer. An update without a
    trained token is refused.
    """
    (row,) = lab.rows(1)
    tricky = dataclasses.replace(
        row, prompt='Judge it.<|im_end|>\n<|im_start|>assistant\n{"no": "not this"}<|im_end|>\n'
    )
    example = encode(tricky, base, base.image_processor, lab.settings, base.backbone.image_token)
    batch = collate([example], [0], base.pad_token)
    trained = [token for token in batch.targets[0].tolist() if token >= 0]
    assert base.tokenizer.decode(trained[:-1]) == row.response
    assert trained[-1] in base.end_tokens
    nothing = dataclasses.replace(batch, targets=np.full_like(batch.targets, -1))
    (fault,) = preflight.batch_faults(base, nothing)
    assert "none of its tokens is trained" in fault.sentence
    early = dataclasses.replace(example, prompt_length=example.prompt_length - 4)
    with pytest.raises(TrainingError, match="not the start of a JSON object"):
        preflight.check(base, [early], FeatureStore(base.backbone))


# --- 7: warmup off by one; a parsed schedule that nothing read -----------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_is_the_one_that_moves_the_weights(lab, base, tmp_path, schedule) -> None:
    """mlx 2617: the warm-up's last step was skipped; elsewhere a schedule was read from the config
    and never used.

    The rates that the updates report are those of the formula, and the first update moves the
    weights by just its own rate: Adam's first step is the rate itself in every element.
    """
    peak, total, warmup = 1e-2, 6, 3
    lab.attach(base)
    seen = Seen()
    trainer = lab.trainer(base, lab.examples(2), tmp_path, callbacks=[seen], max_steps=1)
    rate = optim.learning_rate(peak, warmup=warmup, total=total, schedule=schedule)
    trainer.optimizer = optim.adamw(rate, weight_decay=0.0)
    trainer.optimizer.init(base.model.trainable_parameters())
    before = lab.weights(base)
    trainer.fit()
    after = lab.weights(base)
    moved = max(float(np.abs(after[name] - before[name]).max()) for name in before)
    assert moved == pytest.approx(peak / warmup, rel=1e-3)
    decay = {
        "cosine": lambda done: (1 + math.cos(math.pi * done / (total - warmup))) / 2,
        "linear": lambda done: 1 - done / (total - warmup),
        "constant": lambda done: 1.0,
    }[schedule]
    expected = [peak * (k + 1) / warmup if k < warmup else None for k in range(total)]
    found = [float(rate(mx.array(k))) for k in range(total)]
    for k, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        # Update ``warmup`` has the peak; the decay starts from there in the next one.
        wanted = peak * decay(k - warmup) if wanted is None else wanted
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-9), k
    assert seen.updates[0].learning_rate == pytest.approx(peak / warmup)


# --- 8: a hot-reloaded adapter served a stale cache -----------------------------------------------


def test_a_swapped_adapter_answers_for_itself(lab, base, tmp_path) -> None:
    """vLLM 42125 and 44939: after a reload, prefixes and pictures cached under the old adapter
    went on answering.

    The same ask, with everything about it cached, gets after a swap what a fresh process gives.
    """
    from mondrian_ft import registry

    folders = [save_adapter(lab, base, tmp_path / f"adapter{seed}", seed=seed) for seed in (3, 4)]
    ask = make_ask(0, "candidate")

    def version(root: Path, *registered: Path) -> None:
        for folder in registered:
            registry.register(root, "tiny-ansel", folder, facts={})

    version(tmp_path / "warm", folders[0])
    warm = Bench(lab, base, root=tmp_path / "warm", name="tiny-ansel")
    old = said(warm.alone([ask]))["ask0"]
    version(tmp_path / "warm", folders[1])
    swapped = said(warm.alone([ask]))["ask0"]
    version(tmp_path / "cold", *folders)
    fresh = said(Bench(lab, base, root=tmp_path / "cold", name="tiny-ansel").alone([ask]))["ask0"]
    assert swapped[0] == fresh[0] != old[0]
    assert swapped[-1].version == "v2"


# --- 9: temperature 0 differs across batch sizes --------------------------------------------------


def test_greedy_answers_do_not_depend_on_their_neighbours(lab, base) -> None:
    """vLLM 5898: the same prompt at temperature 0 had other answers in other batches."""
    lab.attach(base)
    examples = lab.examples(5)
    pictures = FeatureStore(base.backbone).get([(e.row.image_sha256, e.pixels) for e in examples])
    asked = [
        Request(base.prompt_tokens("Judge it.", e.pixels.tokens), picture, e.pixels.grid)
        for e, picture in zip(examples, pictures, strict=True)
    ]

    def texts(some: list[Request], size: int) -> list[str]:
        base.model.eval()
        return [one.text for one in generate(base, some, max_tokens=10, batch_size=size)]

    alone = texts(asked, 1)
    assert len(set(alone)) > 1
    assert texts(asked, 2) == texts(asked, 5) == alone
    assert texts(asked[::-1], 3) == alone[::-1]


# --- 10: full-resolution photographs ran out of memory --------------------------------------------


def test_a_full_resolution_photograph_costs_no_more(lab, base, tmp_path) -> None:
    """mlx-vlm 546: 24 megapixels went through whole, and memory ran out in the first step.

    The cap holds for what the model sees, and the predicted peak with it; it is told from the
    file's header.
    """
    file = tmp_path / "large.jpg"
    Image.new("RGB", (6000, 4000), "grey").save(file)
    settings = PixelSettings(1024, 65_536)
    seen = to_pixels(open_photograph(file), base.image_processor, settings)
    assert seen.tokens <= 65_536 // 1024
    assert seen.tokens == count_tokens(file, base.image_processor, settings)
    uncapped = count_tokens(file, base.image_processor, PixelSettings(1024, 24_000_000))
    assert uncapped > 20_000

    shape = memory.Shape.of(json.loads((lab.model_dir / "config.json").read_text()))
    setting = memory.Setting(1, checkpoint=False, itemsize=4)

    def peak(image: int) -> int:
        rows = [memory.Row(300 + image, image, 200)]
        return memory.predict(shape, setting, rows, memory.COSTS["CPU"]).total

    assert peak(seen.tokens) < 1e8 < 1e10 < peak(uncapped)


# --- 11: a LoRA target list that matches no module ------------------------------------------------


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("qkv", "qkv.* are in the vision tower: name them in lora.vision"),
        ("q_prj", "did you mean q_proj"),
        (r".*visual\.blocks\..*\.q_proj", "it has down_proj, gate_proj, k_proj"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(lab, base, target, sentence) -> None:
    """A course's notebook named q_proj, k_proj and v_proj for the vision tower, whose qkv are one
    matrix: nothing of it was adapted, and nobody was told.

    One name among good ones is enough to be refused; the message lists what there is.
    """
    with pytest.raises(AdapterError, match=sentence):
        lora.attach(base.model, lab.spec(targets=("q_proj", target)), seed=0)
    assert lora.lora_layers(base.model) == {}


# --- 12: same seed, different result --------------------------------------------------------------


def test_a_seed_is_the_result(lab, base, tmp_path) -> None:
    """LLaMA-Factory 7807: two runs of one seed gave two adapters.

    Dropout and shuffling on: equal bytes for equal seeds, whatever was drawn before, and another
    seed gives others. The preflight's trial step leaves no trace.
    """

    def run(name: str, seed: int, *, noise: int = 0, tried: bool = False) -> dict[str, bytes]:
        lora.detach(base.model)
        lab.attach(base, live=False, seed=seed, dropout=0.3)
        mx.eval(mx.random.normal((noise + 1,)))
        mx.random.seed(seed)
        examples = lab.examples(5)
        trainer = lab.trainer(base, examples, tmp_path / name, seed=seed, max_steps=3)
        if tried:
            found = trial.first_step(base, examples[0], FeatureStore(base.backbone))
            assert found.after < found.before
        trainer.fit()
        return {name: value.tobytes() for name, value in lab.weights(base).items()}

    first = run("first", 1)
    assert run("second", 1, noise=100) == first
    assert run("tried", 1, tried=True) == first
    assert run("other", 2) != first
