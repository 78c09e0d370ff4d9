"""export, import_adapter, diff and average, as they are typed."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mondrian_ft import __main__ as entry
from mondrian_ft.data.pixels import PixelSettings
from mondrian_ft.evaluation.probing import probe_inputs
from mondrian_ft.files import building, sha256_file
from mondrian_ft.model import adapter as adapters
from mondrian_ft.model import agreement, export, fuse, lora, shards
from mondrian_ft.model.base import load_base
from mondrian_ft.pipeline.training import pixel_facts

Typed = Callable[..., int]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are typed in an empty folder, with nothing of the tester's environment."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def typed(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Types a command on the tiny base; returns the exit code."""

    def run(*argv: str) -> int:
        words = ["mondrian-ft", f"model.path={lab.model_dir}", "tracking=none", *argv]
        monkeypatch.setattr("sys.argv", words)
        return entry.main()

    return run


def make(lab: Any, base: Any, folder: Path, *, facts: Any = None, **changes: Any) -> Path:
    """An adapter directory; the model is its base again."""
    spec = lab.attach(base, **changes)
    settings = PixelSettings(4096, 24576)
    adapters.save(
        folder,
        base,
        spec,
        pixels=pixel_facts(base, settings),
        probe=probe_inputs(base, settings),
        prompts=["p" * 16],
        data_lock="d" * 64,
        facts={"advisor": "ansel", "trained_on": ["1", "2"], **(facts or {})},
    )
    lora.detach(base.model)
    return folder


@pytest.fixture
def adapter(lab: Any, base: Any, tmp_path: Path) -> Path:
    """An adapter directory."""
    return make(lab, base, tmp_path / "adapter")


def record() -> dict[str, Any]:
    """``run.json`` of the run just typed."""
    newest = max(Path("outputs").rglob("run.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def refused(capsys: Any) -> str:
    """The sentence on standard error."""
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    return told[0].removeprefix("error: ")


def nothing_half_written(folder: Path) -> bool:
    return not folder.exists() and not list(folder.parent.glob(".tmp-*"))


# --- export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft", "mlx", "fused", "fused_4bit"])
def test_an_export_is_verified_and_says_how_far_it_is(
    typed, adapter, tmp_path, capsys, name
) -> None:
    """Written, read back, compared on a text and a picture; the card carries the numbers."""
    out = tmp_path / "out"
    assert (
        typed(
            "task=export", f"task.format={name}", "task.adapter=adapter", f"task.output_dir={out}"
        )
        == 0
    )
    shown = capsys.readouterr().out
    facts = record()["exported"]
    assert facts["hash"] == adapters.read(adapter).hash
    for distance in facts["distance"].values():
        if name == "fused_4bit":
            assert 0.1 < distance["largest"] < 10
        else:
            assert distance["largest"] < 1e-4
            assert distance["same_choice"] == 1
    assert "Read back, on a text" in shown
    assert "Read back, on a picture" in shown
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ")
    assert "Read back, on a picture: largest difference of a logit" in card
    assert str(tmp_path) not in card
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_exported_model_answers_like_base_and_adapter(
    lab, base, typed, adapter, tmp_path
) -> None:
    """Not only the product says so."""
    with adapters.applied(adapter, base):
        expected = agreement.probe_logits(base)
    typed("task=export", "task.format=fused", "task.adapter=adapter", "task.output_dir=out")
    found = agreement.probe_logits(load_base(tmp_path / "out"))
    assert max(d.largest for d in agreement.distances(expected, found).values()) < 1e-4


def test_another_precision_is_refused_unless_asked_for(
    lab, base, typed, adapter, tmp_path, capsys
) -> None:
    """A float base's adapter over its quantised base: told in the log, run.json and the card."""
    argv = ("task=export", "task.format=fused", "task.adapter=adapter", "model.quantize_bits=4")
    assert typed(*argv, "task.output_dir=out") == 1
    assert "model.allow_other_precision=true" in refused(capsys)
    argv = (*argv, "model.allow_other_precision=true", "task.max_error=100")
    assert typed(*argv, "task.output_dir=out") == 0
    told = "trained on a base quantised to none and is used on one quantised to 4 bits"
    assert told in " ".join(capsys.readouterr().err.split())
    assert any(told in sentence for sentence in record()["warnings"])
    assert told in (tmp_path / "out" / "README.md").read_text()
    make(lab, base, tmp_path / "other", seed=4)
    typed(
        *("task=average", "task.adapters=[adapter,other]", "model.quantize_bits=8"),
        *("model.allow_other_precision=true", "task.output_dir=mean"),
    )
    manifest = json.loads((tmp_path / "mean" / adapters.MANIFEST).read_text())
    assert "quantised to 8 bits" in manifest["averaged"]["other_precision"]


def test_the_base_alone(typed, base, adapter, tmp_path, capsys) -> None:
    """hf_base takes no adapter, and every other format needs one."""
    assert typed("task=export", "task.format=hf_base", "task.output_dir=out") == 0
    assert record()["exported"]["hash"] is None
    found = agreement.probe_logits(load_base(tmp_path / "out"))
    assert all(np.array_equal(v, found[k]) for k, v in agreement.probe_logits(base).items())
    assert "no adapter is merged in" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert typed("task=export", "task.format=hf_base", "task.adapter=adapter") == 2
    assert "writes the base alone" in refused(capsys)
    assert typed("task=export", "task.format=fused") == 1
    assert "task.adapter is not set" in refused(capsys)


def test_a_wrong_path_is_told_before_the_base_is_loaded(typed, capsys, monkeypatch) -> None:
    """A 4B base takes a minute to load."""
    monkeypatch.setattr("mondrian_ft.pipeline.exporting.load_base_of", pytest.fail)
    assert typed("task=export", "task.adapter=./nowhere") == 1
    assert "does not exist" in refused(capsys)


def test_a_folder_with_files_is_not_overwritten(typed, adapter, tmp_path, capsys) -> None:
    """Whatever is in it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    assert typed("task=export", "task.adapter=adapter", "task.output_dir=out") == 1
    assert "already holds files" in refused(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["fused", "fused_4bit", "mlx"])
def test_a_full_disk_leaves_nothing(typed, adapter, tmp_path, capsys, monkeypatch, name) -> None:
    """Neither half an export nor a temporary folder; told in one sentence."""

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_to_bytes", full)
    monkeypatch.setattr(export, "atomic_write_bytes", full)
    out = tmp_path / "out"
    argv = ("task.adapter=adapter", "task.max_error=9", f"task.output_dir={out}")
    assert typed("task=export", f"task.format={name}", *argv) == 1
    assert f"cannot write {out}: No space left on device" in refused(capsys)
    assert nothing_half_written(out)


def _forget_scale(monkeypatch: Any) -> None:
    real = fuse.merge
    monkeypatch.setattr(fuse, "merge", lambda w, a, b, scale, m=None: real(w, a, b, 1.0, m))


def _forget_transpose(monkeypatch: Any) -> None:
    real = shards.write_model

    def wrong(folder: Path, entries: Any, **options: Any) -> Any:
        turned = [
            shards.entry_of(e.name, e.load() * 0 + 1) if "patch_embed.proj.w" in e.name else e
            for e in entries
        ]
        return real(folder, turned, **options)

    monkeypatch.setattr(shards, "write_model", wrong)


def _swap_exported(monkeypatch: Any) -> None:
    real = export.export_mlx

    def wrong(adapter: Any, folder: Path) -> Path:
        adapter.tensors.update({k: v * 0.5 for k, v in adapter.tensors.items() if k[-1] == "b"})
        return real(adapter, folder)

    monkeypatch.setattr(export, "export_mlx", wrong)


@pytest.mark.parametrize(
    ("name", "plant"),
    [("fused", _forget_scale), ("fused", _forget_transpose), ("mlx", _swap_exported)],
)
def test_a_planted_fault_is_found_by_reading_back(
    typed, adapter, tmp_path, capsys, monkeypatch, name, plant
) -> None:
    """Exit 1; what was written is kept, under a name that says what it is."""
    plant(monkeypatch)
    argv = ("task=export", f"task.format={name}", "task.adapter=adapter", "task.output_dir=out")
    assert typed(*argv) == 1
    told = refused(capsys)
    assert "is not what it should be: read back, its logits differ" in told
    (kept,) = tmp_path.glob("out.failed-*")
    assert str(kept) in told
    assert list(kept.glob("*.safetensors"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_quantising_above_the_limit_is_refused_unless_forced(
    typed, adapter, tmp_path, capsys
) -> None:
    """The tiny model's matrices quantise badly: about a third of the adapter's effect."""
    argv = ("task=export", "task.format=fused_4bit", "task.adapter=adapter", "task.output_dir=out")
    assert typed(*argv, "task.max_error=0.05") == 1
    told = refused(capsys)
    share = float(re.search(r"is (0\.\d\d) of the adapter's effect", told)[1])  # pyright: ignore
    assert 0.1 < share < 0.5
    assert nothing_half_written(tmp_path / "out")
    assert typed(*argv, "task.max_error=0.05", "task.force=true") == 0
    facts = record()
    assert any("task.force=true" in warning for warning in facts["warnings"])
    assert len(facts["exported"]["quantisation"]) == 14


def test_an_adapter_that_half_precision_swallows(lab, typed, tmp_path, capsys) -> None:
    """Merged into bfloat16, a faint update is rounded away; that is told, not shipped."""
    half = lab.halve(lab.write_model(tmp_path / "half", seed=1))
    base = load_base(half, name=str(half))
    for scale, strength in (("faint", 2e-3), ("plain", 1.0)):
        spec = lab.attach(base, alpha=8.0 * strength)
        adapters.save(
            tmp_path / scale,
            base,
            spec,
            pixels=pixel_facts(base, PixelSettings(4096, 24576)),
            prompts=[],
            data_lock="d",
            facts={},
            probe=probe_inputs(base, PixelSettings(4096, 24576)),
        )
        lora.detach(base.model)
    argv = ("task=export", "task.format=fused", f"model.path={half}")
    assert typed(*argv, "task.adapter=plain", "task.output_dir=out") == 0
    assert re.search(r"Rounding moves the logits by 0\.0\d of what", capsys.readouterr().out)
    assert typed(*argv, "task.adapter=faint", "task.output_dir=lost") == 1
    assert "the adapter is lost in the rounding" in refused(capsys)


def test_another_base_is_refused(lab, typed, adapter, tmp_path, capsys) -> None:
    """Merged into another model an adapter would be noise."""
    other = lab.write_model(tmp_path / "other", seed=7)
    argv = ("task=export", "task.adapter=adapter", "task.output_dir=out")
    assert typed(*argv, f"model.path={other}") == 1
    assert "set model.path to the base it was trained on" in refused(capsys)
    assert nothing_half_written(tmp_path / "out")


class Hub:
    """A hub that remembers what it was asked, or refuses."""

    calls: ClassVar[list[Any]] = []
    refuses = False

    def create_repo(self, name: str, **options: Any) -> None:
        if self.refuses:
            raise ConnectionError("401 Client Error: Unauthorized\nmore lines")
        self.calls.append(("create", name, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """Takes the place of the real one, which no test may reach."""
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


def test_nothing_is_uploaded_unless_asked(typed, adapter, hub) -> None:
    """Not even looked for."""
    assert typed("task=export", "task.adapter=adapter", "task.format=peft") == 0
    assert hub.calls == []


def test_an_upload_is_private_and_of_what_was_verified(typed, adapter, hub, capsys) -> None:
    """The repository is made private unless told otherwise."""
    argv = ("task=export", "task.adapter=adapter", "task.format=peft")
    assert typed(*argv, "task.push_to_hub=me/ansel") == 0
    create, upload = hub.calls
    assert create == ("create", "me/ansel", {"private": True, "exist_ok": True})
    assert upload[2] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert record()["pushed"] == {"repository": "me/ansel", "private": True}
    assert typed(*argv, "task.push_to_hub=me/ansel", "task.private=false") == 0
    assert hub.calls[2][2]["private"] is False


def test_a_failed_export_is_not_uploaded(typed, adapter, hub, monkeypatch) -> None:
    """After verification, never before it."""
    _swap_exported(monkeypatch)
    argv = ("task=export", "task.adapter=adapter", "task.format=mlx")
    assert typed(*argv, "task.push_to_hub=me/ansel") == 1
    assert hub.calls == []


def test_a_hub_that_refuses(typed, adapter, hub, capsys, monkeypatch) -> None:
    """The export stays; the sentence says how to go on."""
    monkeypatch.setattr(hub, "refuses", True)
    argv = ("task=export", "task.adapter=adapter", "task.output_dir=out")
    assert typed(*argv, "task.push_to_hub=me/ansel") == 1
    told = refused(capsys)
    assert "was exported but not uploaded to me/ansel (401 Client Error: Unauthorized)" in told
    assert Path("out/adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("task=export", "task.push_to_hub=ansel"), "must be organisation/name"),
        (("task=export", "task.max_error=0"), "task.max_error is 0"),
        (("task=average", "task.adapters=[a,b]", "task.weights=[1]"), "1 numbers for 2 adapters"),
        (("task=average", "task.adapters=[a,b]", "task.weights=[1,1]"), "add up to 2"),
        (("task=average", "task.rank=0"), "task.rank is 0"),
        (("task=import_adapter", "task.scale_rule=beta"), "alpha"),
    ],
)
def test_keys_out_of_range(typed, capsys, words, sentence) -> None:
    """Exit 2, before anything is loaded."""
    assert typed(*words) == 2
    assert sentence in refused(capsys)


# --- import -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft", "mlx"])
def test_what_is_exported_comes_back(typed, adapter, tmp_path, capsys, name) -> None:
    """The same weights and scale, so the same hash; with where it came from and what is assumed."""
    typed("task=export", f"task.format={name}", "task.adapter=adapter", "task.output_dir=out")
    capsys.readouterr()
    assert typed("task=import_adapter", "task.source=out", "task.output_dir=back") == 0
    shown = capsys.readouterr().out
    back = adapters.read(tmp_path / "back")
    assert back.hash == adapters.read(adapter).hash
    (weights,) = Path("out").glob("*.safetensors")
    about = back.manifest["imported"]
    assert about["layout"] == {"peft": "PEFT", "mlx": "mlx-vlm"}[name]
    assert (about["file"], about["sha256"]) == (weights.name, sha256_file(weights))
    assert back.manifest["data_lock"] == "unknown"
    assert back.manifest["pixels"]["max_pixels"] == 24_576
    assert str(tmp_path) not in json.dumps(about)
    assert "method    LoRA, rank 4, scale 2" in shown
    assert "assumed   pixels are prepared as configured now" in shown
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"imported from {about['layout']}'s layout" in card


def test_an_old_file_asks_and_is_told(lab, base, typed, tmp_path, capsys) -> None:
    """The users' adapters of 2025, as found in facts of theirs: rank 8, alpha 0.1."""
    spec = lab.attach(base, targets=("q_proj", "k_proj", "v_proj", "o_proj"), rank=8)
    from safetensors.numpy import save_file

    names = {"lora_a": "A", "lora_b": "B"}
    tensors = {
        f"{name.rsplit('.', 1)[0]}.{names[name.rsplit('.', 1)[1]]}": value
        for name, value in lab.weights(base).items()
    }
    lora.detach(base.model)
    assert spec.rank == 8
    source = tmp_path / "old"
    source.mkdir()
    save_file(tensors, source / "adapters.safetensors")
    (source / "adapter_config.json").write_text('{"rank": 8, "alpha": 0.1, "dropout": 0.1}')
    argv = ("task=import_adapter", f"task.source={source}")
    assert typed(*argv) == 1
    told = refused(capsys)
    assert "task.scale_rule=alpha multiplies by 0.1" in told
    assert "task.scale_rule=alpha_over_rank by 0.0125" in told
    assert typed(*argv, "task.scale_rule=alpha", "task.output_dir=new") == 0
    read = adapters.read(tmp_path / "new")
    assert read.spec.scale == 0.1
    assert any("scale is 0.1, by" in line for line in read.manifest["imported"]["assumed"])


def test_an_adapter_without_effect_is_refused(lab, base, typed, tmp_path, capsys) -> None:
    """B of zeros: nothing is written."""
    source = make(lab, base, tmp_path / "source")
    from safetensors.numpy import load_file, save_file

    file = source / adapters.WEIGHTS
    save_file({k: v * ("lora_A" in k) for k, v in load_file(file).items()}, file)
    assert typed("task=import_adapter", "task.source=source", "task.output_dir=out") == 1
    assert "changes nothing" in refused(capsys)
    assert nothing_half_written(tmp_path / "out")


def test_a_directory_of_ours_loses_its_history_and_says_so(typed, adapter, capsys) -> None:
    """It can be used as it is; imported, what it was trained on is no longer known."""
    assert typed("task=import_adapter", "task.source=adapter") == 0
    assert "manifest.json of its own, which was not taken over" in capsys.readouterr().out


def test_no_source(typed, capsys) -> None:
    """Told which key to set."""
    assert typed("task=import_adapter") == 1
    assert "task.source is not set" in refused(capsys)


# --- diff and average -------------------------------------------------------------------------


def test_two_adapters_are_compared_without_a_base(
    lab, base, typed, tmp_path, capsys, monkeypatch
) -> None:
    """Settings, data, metrics and updates, as a table and as diff.json."""
    make(lab, base, tmp_path / "one", seed=1)
    make(lab, base, tmp_path / "two", seed=2, rank=6, facts={"trained_on": ["3"]})
    report = {
        "evidence": {
            "adapter_hash": adapters.read(tmp_path / "one").hash,
            "verdict": "better",
            "n_photographs": 9,
            "arms": {"tuned": {"n": 9, "format_strict": 1.0, "score_mae": 0.5}},
        }
    }
    (tmp_path / "one" / "evaluation").mkdir()
    (tmp_path / "one" / "evaluation" / "comparison_report.json").write_text(json.dumps(report))
    monkeypatch.setattr("mondrian_ft.model.base.load_base", pytest.fail)
    assert typed("task=diff", "task.adapter=one", "task.other=two") == 0
    shown = capsys.readouterr().out
    (written,) = Path("outputs").rglob("diff.json")
    found = json.loads(written.read_text())
    assert (found["same"], found["same_base"], found["same_data_lock"]) == (False, True, True)
    settings = {item["key"]: item["values"] for item in found["settings"]}
    assert settings["lora.rank"] == [4, 6]
    assert "lora.alpha" not in settings
    assert found["metrics"][0]["score_mae"] == 0.5
    assert found["metrics"][1] is None
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, None]
    assert len(found["matrices"]) == 14
    assert found["layers"][-1]["relative"] > 0.5
    assert re.search(r"lora\.rank\s+4\s+6", shown)


def test_metrics_of_other_weights_are_not_shown(lab, base, typed, tmp_path) -> None:
    """An evaluation belongs to one hash."""
    make(lab, base, tmp_path / "one")
    folder = tmp_path / "one" / "evaluation"
    folder.mkdir()
    report = {"evidence": {"adapter_hash": "0" * 64, "verdict": "better", "arms": {}}}
    (folder / "comparison_report.json").write_text(json.dumps(report))
    assert typed("task=diff", "task.adapter=one", "task.other=one") == 0
    (written,) = Path("outputs").rglob("diff.json")
    found = json.loads(written.read_text())
    assert found["metrics"] == [None, None]
    assert found["same"] is True


def test_dora_says_what_is_compared(lab, base, typed, tmp_path, capsys) -> None:
    """Its update depends on the base."""
    make(lab, base, tmp_path / "one", method="dora")
    assert typed("task=diff", "task.adapter=one", "task.other=one") == 0
    assert "before DoRA's magnitudes" in capsys.readouterr().out


def test_an_average_is_an_adapter_with_its_sources(lab, base, typed, tmp_path, capsys) -> None:
    """Provenance of both, and everything either was trained on: neither may be judged on it."""
    make(lab, base, tmp_path / "one", seed=1)
    make(lab, base, tmp_path / "two", seed=2, facts={"trained_on": ["2", "3"]})
    argv = ("task=average", "task.adapters=[one,two]", "task.output_dir=mean")
    assert typed(*argv, "task.weights=[0.25,0.75]") == 0
    assert "rank 8, exact" in capsys.readouterr().out
    mean = adapters.read(tmp_path / "mean")
    sources = mean.manifest["averaged"]["adapters"]
    assert [source["weight"] for source in sources] == [0.25, 0.75]
    assert [s["hash"] for s in sources] == [
        adapters.read(tmp_path / name).hash for name in ("one", "two")
    ]
    assert mean.manifest["trained_on"] == ["1", "2", "3"]
    assert mean.manifest["data_lock"] == "d" * 64
    assert "the average 0.25 × `" in (tmp_path / "mean" / "README.md").read_text()
    assert typed("task=average", "task.adapters=[one,two]", "task.rank=4") == 0
    assert re.search(r"rank 4, \d+\.\d\d% of the update cut off", capsys.readouterr().out)


def test_averages_that_are_refused(lab, base, typed, tmp_path, capsys) -> None:
    """One adapter, DoRA, other pixels, and two that cancel; nothing is written."""
    one, two = make(lab, base, tmp_path / "one"), make(lab, base, tmp_path / "two", seed=2)
    make(lab, base, tmp_path / "dora", method="dora")
    manifest = json.loads((two / "manifest.json").read_text())
    manifest["pixels"]["fingerprint"] = "0" * 16
    (two / "manifest.json").write_text(json.dumps(manifest))
    assert one.is_dir()
    cases = {
        "[one]": "names 1; give two or more",
        "[one,dora]": "is a DoRA adapter",
        "[one,two]": "has pixels fingerprint",
    }
    for given, sentence in cases.items():
        assert typed("task=average", f"task.adapters={given}", "task.output_dir=out") == 1
        assert sentence in refused(capsys)
    argv = ("task=average", "task.adapters=[one,one]", "task.weights=[2.0,-1.0]")
    assert typed(*argv, "task.output_dir=same") == 0, "an extrapolation is an average too"
    assert nothing_half_written(tmp_path / "out")


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(tmp_path) -> None:
    """Also when what fills it fails."""
    final = tmp_path / "deep" / "final"
    with pytest.raises(KeyError), building(final) as made:
        (made / "file").write_text("half")
        raise KeyError
    assert nothing_half_written(final)
    with building(final) as made:
        (made / "file").write_text("whole")
        assert not final.exists()
    assert (final / "file").read_text() == "whole"
