"""The schema and the YAML files say the same, and nothing wrong gets past ``load``."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from mondrian_ft import config as config_module
from mondrian_ft import help as help_page
from mondrian_ft.config import as_dict, conf_dir, config_hash, load, register_schemas
from mondrian_ft.errors import ConfigError
from mondrian_ft.keys import keys, suggest_key
from mondrian_ft.schema import (
    GROUPS,
    Arm,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LoraMethod,
    ModelConfig,
    OptimizerConfig,
    TrainerConfig,
)
from mondrian_ft.tasks import TASKS, Evaluate, Link, Train

CONF = Path(__file__).resolve().parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = [
    f"{group}={path.stem}"
    for group in (*GROUPS, "task")
    for path in sorted((CONF / group).glob("*.yaml"))
]


@pytest.fixture(scope="module", autouse=True)
def hydra_conf() -> Iterator[None]:
    """Hydra looks into the checkout's conf/, with the schemas registered."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str, cwd: Path | None = None) -> Config:
    return load(compose("config", list(overrides)), cwd)


def test_the_default_is_the_sample() -> None:
    """With nothing said, the whole job runs on embedded data and an embedded model."""
    config = composed()
    assert config.data.db_path is None
    assert config.model.path is None
    assert config.experiment_name == "sample"
    assert as_dict(config)["task"] == {"name": "experiment", "output_dir": None}
    assert (config.data.train_split, config.data.val_split, config.data.test_split) == (
        0.7,
        0.15,
        0.15,
    )
    assert config.data.max_pixels == 24_576


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("more", [(), ("model=sample", "data=sample"), ("task=train",)])
def test_every_committed_experiment_composes(name: str, more: tuple[str, ...]) -> None:
    """What is committed can be run, also on the sample, and names its own run folder."""
    assert composed(f"+experiment={name}", *more).experiment_name == name


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    """Each option of each group loads, and a task's option chooses that task."""
    config = composed(option)
    group, _, name = option.partition("=")
    if group == "task":
        assert type(config.task) is TASKS[name]


def test_every_task_has_its_file() -> None:
    """task=NAME works for every task there is."""
    assert {path.stem for path in (CONF / "task").glob("*.yaml")} == set(TASKS)


def test_ansel_v1_is_the_workbooks_recipe() -> None:
    """Phase 3.2 of the workbook, value for value."""
    config = composed("+experiment=ansel_v1")
    assert config.model.path == "Qwen/Qwen3-VL-4B-Instruct"
    assert config.data.advisor == "ansel"
    assert (config.data.train_split, config.data.val_split, config.data.test_split) == (0.8, 0.2, 0)
    trainer, optimizer = config.trainer, config.optimizer
    assert (trainer.epochs, trainer.batch_size, trainer.save_every) == (3, 2, 250)
    assert trainer.grad_checkpoint, "a batch of photographs has to fit a Mac"
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (2e-4, 100)


def test_ansel_v1_keeps_its_recipe_on_the_sample() -> None:
    """The sample model's own hyper-parameters do not leak into an experiment."""
    real = composed("+experiment=ansel_v1")
    sample = composed("+experiment=ansel_v1", "model=sample", "data=sample")
    assert sample.model.path is None
    assert sample.data.db_path is None
    assert sample.data.test_split == 0.15
    assert sample.optimizer == real.optimizer
    assert sample.trainer == real.trainer
    assert sample.lora == real.lora


def test_the_samples_recipe_is_only_the_samples() -> None:
    """Another base without an experiment starts from the groups' values, not the sample's."""
    other = composed("model=qwen3_vl_4b", "data=mondrian")
    assert other.optimizer == OptimizerConfig()
    assert other.trainer == TrainerConfig()
    assert composed().optimizer != OptimizerConfig()
    assert composed("trainer.epochs=1").trainer.epochs == 1


def test_dry_run_is_small_alone_and_combined() -> None:
    """Five rows, one epoch, one row at a time, for the sample and for any other experiment."""
    for overrides in (["+experiment=dry_run"], ["+experiment=[ansel_v1,dry_run]"]):
        config = composed(*overrides)
        assert config.data.limit == 5
        assert (config.trainer.epochs, config.trainer.batch_size) == (1, 1)
    assert composed("+experiment=[ansel_v1,dry_run]").model.path == "Qwen/Qwen3-VL-4B-Instruct"


@pytest.mark.parametrize(
    ("group", "option"),
    [
        ("lora", "all_linear"),
        ("optimizer", "adamw"),
        ("trainer", "default"),
        ("eval", "default"),
        ("registry", "default"),
        ("serve", "default"),
        ("tracking", "wandb"),
    ],
)
def test_a_default_option_restates_the_schema(group: str, option: str) -> None:
    """The value a person reads in YAML is the one a notebook gets from the dataclass."""
    written = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
    assert written.pop("defaults") == ["schema", "_self_"]
    schema = as_dict(Config())[group]
    assert written == {key: schema[key] for key in written}


def test_yaml_files_are_commented_and_typed() -> None:
    """Each file opens with a comment for a person and starts from its schema."""
    for path in sorted(CONF.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        group = path.parent.name
        assert text.startswith("# "), path
        if group in ("experiment", "recipe", "sweep"):
            assert text.startswith("# @package _global_\n# "), path
        elif group != "conf":
            schema = f"schema_{path.stem}" if group == "task" else "schema"
            assert yaml.safe_load(text)["defaults"] == [schema, "_self_"], path


def test_help_marks_what_config_yaml_chooses() -> None:
    """The asterisks of --help are the defaults list."""
    chosen: dict[str, str] = {}
    for item in yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]:
        if isinstance(item, dict):
            chosen |= item
    assert {group: chosen[group] for group in GROUPS} == help_page.DEFAULTS


def test_the_promised_keys_are_there() -> None:
    """Names that people and scripts rely on."""
    promised = """
        data: db_path source_dir analysis_dir advisor output_dir manifest train_data val_data
              train_split val_split test_split limit max_pixels min_pixels seed
        model: path dtype quantize_bits
        lora: rank alpha dropout target_modules method
        optimizer: learning_rate weight_decay warmup_steps schedule max_grad_norm
        trainer: epochs max_steps batch_size accumulate save_every eval_every patience
                 grad_checkpoint seed resume
        eval: max_examples max_tokens temperature batch_size arms report judge_url judge_model
              judge_key_env judge_timeout against latency
        tracking: mode project entity group tags
        registry: root name gate gate.inconclusive gate.no_worse gate.latency mirror
        serve: upload_dir token adapters max_queue
        task: output_dir adapter format version channel force reason keep host port model_mode
              ab_test_split db_path
    """
    group = ""
    known = set(keys())
    for word in promised.split():
        if word.endswith(":"):
            group = word[:-1]
        else:
            assert f"{group}.{word}" in known


@pytest.mark.parametrize("module", ["schema.py", "tasks.py"])
def test_every_key_has_a_docstring(module: str) -> None:
    """One line under each field says what it means."""
    path = Path(config_module.__file__).with_name(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef) or node.name == "Config":
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"
                assert isinstance(after.value, ast.Constant)


# --- what load refuses


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("+lora.rnk=4", "lora.rnk", "lora.rank"),
        ("++lora.rnk=4", "lora.rnk", "lora.rank"),
        ("+lora.rnk.deep=4", "lora.rnk", "lora.rank"),
        ("+trainer.learning_rate=1", "trainer.learning_rate", "optimizer.learning_rate"),
        ("+optimiser.learning_rate=1", "optimiser", "optimizer"),
        ("+experimnt=ansel_v1", "experimnt", "+experiment=NAME"),
        ("+rank=4", "rank", "lora.rank"),
        ("+lr=4", "lr", "optimizer.learning_rate"),
    ],
)
def test_undeclared_keys_are_refused(override: str, key: str, meant: str) -> None:
    """A plus gets a key past Hydra, but not past load, which names the nearest one."""
    with pytest.raises(ConfigError) as caught:
        composed(override)
    assert str(caught.value) == f"there is no key {key}; did you mean {meant}?"


def test_a_foreign_key_of_a_task_is_refused_with_its_own() -> None:
    """The keys a task takes are its own; another task's are foreign."""
    with pytest.raises(ConfigError, match=r"task=link has no key task\.adapter; it takes none"):
        composed("task=link", "+task.adapter=x")
    with pytest.raises(ConfigError, match=r"task=export has no key task\.fromat; did you mean"):
        composed("task=export", "+task.fromat=mlx")


@pytest.mark.parametrize("key", ["save_freq", "lora_path", "base_model", "output_report"])
def test_the_workbooks_flags_lead_to_our_keys(key: str) -> None:
    """Someone who types an old name is sent to a key that exists."""
    assert suggest_key(key) in keys()


@pytest.mark.parametrize(
    ("schema", "values", "sentence"),
    [
        (DataConfig, {"train_split": 0.9}, "must add up to 1"),
        (DataConfig, {"train_split": 1.2, "val_split": -0.2}, r"data\.train_split is 1\.2"),
        (DataConfig, {"train_split": float("nan")}, r"data\.train_split is nan"),
        (DataConfig, {"limit": 0}, r"data\.limit is 0, but it must be 1 or more"),
        (DataConfig, {"max_pixels": 0}, r"data\.max_pixels is 0"),
        (DataConfig, {"min_pixels": 9, "max_pixels": 8}, r"at most data\.max_pixels, 8"),
        (DataConfig, {"seed": -1}, r"data\.seed is -1"),
        (DataConfig, {"advisor": ""}, r"data\.advisor is empty"),
        (DataConfig, {"source_dir": "s"}, r"data\.source_dir is s but data\.db_path is null"),
        (DataConfig, {"db_path": "a.db"}, r"data\.source_dir and data\.analysis_dir are null"),
        (DataConfig, {"db_path": "a.db", "source_dir": "s"}, r"data\.analysis_dir is null"),
        (DataConfig, {"db_path": []}, "a path or a list of paths"),
        (DataConfig, {"db_path": [1]}, "a path or a list of paths"),
        (ModelConfig, {"quantize_bits": 3}, r"model\.quantize_bits is 3"),
        (ModelConfig, {"path": ""}, r"model\.path is empty"),
        (LoraConfig, {"rank": 0}, r"lora\.rank is 0"),
        (LoraConfig, {"alpha": 0.0}, r"lora\.alpha is 0\.0"),
        (LoraConfig, {"dropout": 1.0}, r"lora\.dropout is 1\.0"),
        (LoraConfig, {"target_modules": []}, r"lora\.target_modules"),
        (LoraConfig, {"target_modules": ["q_proj", "q_proj"]}, "different layer names"),
        (OptimizerConfig, {"learning_rate": 0.0}, r"optimizer\.learning_rate is 0\.0"),
        (OptimizerConfig, {"learning_rate": float("inf")}, r"optimizer\.learning_rate is inf"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"optimizer\.weight_decay"),
        (OptimizerConfig, {"warmup_steps": -1}, r"optimizer\.warmup_steps"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, r"optimizer\.max_grad_norm"),
        (TrainerConfig, {"epochs": 0}, r"trainer\.epochs is 0"),
        (TrainerConfig, {"batch_size": 0}, r"trainer\.batch_size"),
        (TrainerConfig, {"save_every": 0}, r"trainer\.save_every"),
        (TrainerConfig, {"patience": 0}, r"trainer\.patience"),
        (TrainerConfig, {"resume": ""}, r"trainer\.resume is empty"),
        (EvalConfig, {"batch_size": 0}, r"eval\.batch_size"),
        (EvalConfig, {"temperature": -1.0}, r"eval\.temperature"),
        (EvalConfig, {"arms": []}, r"eval\.arms"),
        (EvalConfig, {"judge_url": "http://h/v1"}, r"eval\.judge_model is not"),
        (EvalConfig, {"judge_model": "m"}, r"eval\.judge_model is m but eval\.judge_url is null"),
        (EvalConfig, {"judge_url": "h:80/v1", "judge_model": "m"}, "plain http or https address"),
        (EvalConfig, {"judge_url": "https://", "judge_model": "m"}, "plain http or https address"),
        (EvalConfig, {"judge_url": "http://h:x/", "judge_model": "m"}, "plain http or https"),
        (EvalConfig, {"judge_url": "http://[h/", "judge_model": "m"}, "plain http or https"),
        (EvalConfig, {"judge_url": "http://h/ v", "judge_model": "m"}, "plain http or https"),
        (
            EvalConfig,
            {"judge_url": "http://h/v1", "judge_model": "m", "arms": [Arm.tuned]},
            r"eval\.arms has not both base and tuned",
        ),
        (EvalConfig, {"judge_timeout": 0.0}, r"eval\.judge_timeout is 0\.0, .* above 0"),
        (EvalConfig, {"judge_timeout": float("inf")}, r"eval\.judge_timeout is inf"),
        (Config, {"experiment_name": "../x"}, r"experiment_name is \.\./x"),
        (Config, {"experiment_name": ""}, "experiment_name is empty"),
    ],
)
def test_values_out_of_range(schema: type, values: dict[str, Any], sentence: str) -> None:
    """The message names the key, its value and the rule; a notebook gets the same one."""
    with pytest.raises(ConfigError, match=sentence):
        schema(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"judge_url": "https://anna:sk-secret@h/v1", "judge_model": "m"},
        {"judge_url": "https://h/v1?key=sk-secret", "judge_model": "m"},
        {"judge_url": "https://h/v1#sk-secret", "judge_model": "m"},
        {"judge_key_env": "sk-secret"},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_shown(values: dict[str, Any]) -> None:
    """The config goes into run.json, the page and W&B, so no key may be in it."""
    with pytest.raises(ConfigError) as caught:
        EvalConfig(**values)
    assert "sk-secret" not in str(caught.value)


def test_a_judge_is_taken_from_the_command_line() -> None:
    """Off unless an address is given; a local server and a distant one both are addresses."""
    assert composed().eval.judge_url is None
    for url in ("http://localhost:8000/v1", "http://[::1]:11434/v1", "https://api.openai.com/v1"):
        config = composed(f"eval.judge_url='{url}'", "eval.judge_model=gpt-x")
        assert (config.eval.judge_url, config.eval.judge_model) == (url, "gpt-x")


# --- paths


def test_relative_paths_are_taken_from_where_the_command_is_typed(tmp_path: Path) -> None:
    """One place makes every path absolute; a hub id and a word stay what they are."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    config = composed(
        "data=mondrian",
        "data.db_path=[a.db,/b/../c.db]",
        "data.output_dir=./training_data",
        "eval.report=out/../report.json",
        "task=evaluate",
        "task.adapter=./nowhere",
        "model.path=models/mine",
        cwd=tmp_path,
    )
    assert config.data.db_path == [str(tmp_path / "a.db"), "/c.db"]
    assert config.data.source_dir == str(tmp_path / "mondrian" / "source")
    assert config.data.output_dir == str(tmp_path / "training_data")
    assert config.eval.report == str(tmp_path / "report.json")
    assert isinstance(config.task, Evaluate)
    assert config.task.adapter == str(tmp_path / "nowhere")
    assert config.model.path == str(tmp_path / "models" / "mine")
    assert config.registry.root == str(tmp_path / "outputs" / "registry")
    assert config.trainer.resume == "never"
    assert composed("model=qwen3_vl_4b", cwd=tmp_path).model.path == "Qwen/Qwen3-VL-4B-Instruct"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tilde inside key=value is not the shell's to expand, so it is ours."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert composed("model.path='~/qwen'").model.path == str(tmp_path / "qwen")


def test_a_file_named_auto_does_not_capture_resume(tmp_path: Path) -> None:
    """``never`` and ``auto`` are words, whatever lies in the folder."""
    (tmp_path / "auto").mkdir()
    assert composed("trainer.resume=auto", cwd=tmp_path).trainer.resume == "auto"


def test_conf_dir_of_a_checkout_and_of_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout reads its own conf/; an installed package reads the copy inside it."""
    assert conf_dir() == str(CONF)
    monkeypatch.setattr(config_module, "__file__", str(tmp_path / "mondrian_ft" / "config.py"))
    assert conf_dir() == "pkg://mondrian_ft.conf"


# --- identity


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, Enum):
        members = list(type(value))
        return members[(members.index(value) + 1) % len(members)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return value[:-1] or ["more"]
    return 1 if value is None else f"{value}x"


@pytest.mark.parametrize("group", ["data", "model", "lora", "optimizer", "trainer", "eval"])
def test_the_hash_covers_every_key_that_can_change_a_number(group: str) -> None:
    """Paths, and whether a run is resumed, identify nothing; every other key does."""
    before = config_hash(Config())
    for item in dataclasses.fields(GROUPS[group]):
        config = Config()
        owner = getattr(config, group)
        value = getattr(owner, item.name)
        if isinstance(value, Enum) and len(type(value)) == 1:
            continue
        setattr(owner, item.name, changed(value))
        aside = bool(item.metadata.get("path") or item.metadata.get("aside"))
        assert (config_hash(config) == before) == aside, f"{group}.{item.name}"


def test_the_hash_ignores_what_only_names_the_run() -> None:
    """The same training has the same hash from another task, name, folder or account."""
    config = Config(task=Train(output_dir="/x"), experiment_name="other")
    config.tracking.project = "other"
    config.registry.root = "/elsewhere"
    assert config_hash(config) == config_hash(Config())


def test_as_dict_is_plain_json() -> None:
    """run.json and training_args.json hold the whole config, enums as their words."""
    plain = as_dict(Config(task=Link()))
    assert json.loads(json.dumps(plain)) == plain
    assert plain["lora"]["method"] == "lora"
    assert type(plain["lora"]["method"]) is str
    assert isinstance(Config().lora.method, LoraMethod)
    assert plain["eval"]["arms"] == ["base", "tuned"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optimizer.vision_learning_rate=1e-4"], "lora.vision is empty, so the tower does not"),
        (
            ["lora=vision", "lora.target_modules=[]", "optimizer.vision_learning_rate=1e-4"],
            "lora.target_modules is empty, so optimizer.learning_rate is the tower's",
        ),
        (["lora.target_modules=[]"], "one at least where lora.vision is empty"),
        (["lora=vision", "lora.vision=[qkv,qkv]"], "lora.vision is"),
        (
            ["lora=vision", "lora.target_modules=[]", "lora.layers=[0]"],
            "lora.target_modules is empty, so there is nothing for it to choose among",
        ),
    ],
)
def test_what_the_tower_learns_has_to_fit_together(overrides: list[str], sentence: str) -> None:
    """A rate for nothing, or layers of nothing, is no setting that is silently without effect."""
    with pytest.raises(ConfigError, match=sentence):
        composed(*overrides)
    config = composed("lora=vision", "optimizer.vision_learning_rate=1e-4")
    assert config.lora.vision == ["qkv", "proj", "linear_fc1", "linear_fc2"]
    assert composed("lora=vision", "lora.target_modules=[]").lora.target_modules == []
