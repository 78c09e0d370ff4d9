"""The typed schema of an experiment: one dataclass per group, one docstring per key.

A key exists only if a dataclass here (or in ``tasks``) declares it and a line of code reads it.
Every field has a default, so that a group can be built in a notebook with the keys that matter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any
from urllib.parse import urlsplit

from .data.droppable import DROPPABLE
from .errors import ConfigError, nearest
from .tasks import Task


class DType(StrEnum):
    """Floating-point type of the base model; ``auto`` is float32 on CPU, bfloat16 on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LoraMethod(StrEnum):
    """``lora`` and ``dora`` scale by alpha / rank, ``rslora`` by alpha / sqrt(rank) (Kalajdzievski
    2023); ``dora`` also trains the magnitude of each output (Liu et al. 2024)."""

    lora = "lora"
    rslora = "rslora"
    dora = "dora"


class OptimizerName(StrEnum):
    """Optimizers there are."""

    adamw = "adamw"
    adam = "adam"
    muon = "muon"


class Schedule(StrEnum):
    """What the learning rate does after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Monitor(StrEnum):
    """What tells a better checkpoint from a worse one."""

    val_loss = "val_loss"
    format_compliance = "format_compliance"
    score_mae = "score_mae"


class Arm(StrEnum):
    """Models an evaluation can compare, and the conditions they answer under."""

    base = "base"
    tuned = "tuned"
    production = "production"
    base_examples = "base_examples"
    base_constrained = "base_constrained"
    tuned_constrained = "tuned_constrained"
    production_constrained = "production_constrained"
    base_examples_constrained = "base_examples_constrained"


class Undecided(StrEnum):
    """What becomes of an adapter whose score error is not better, though not worse either."""

    refuse = "refuse"
    allow = "allow"


class Accept(StrEnum):
    """Which analyses are linked: none that had to be mended, complete ones, or all with scores."""

    strict = "strict"
    mended = "mended"
    all = "all"


class PromptExample(Enum):
    """What becomes of the scores in a prompt's filled example."""

    # No StrEnum: a member named strip would take the place of the string's own method.

    keep = "keep"
    strip = "strip"


class TrackingMode(StrEnum):
    """Where W&B keeps the numbers; ``auto`` is online when logged in, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


def _path(default: str | None = None, *, or_name: bool = False) -> Any:
    """A path; ``or_name`` lets a bare word that is no file here stand for a name."""
    return field(default=default, metadata={"path": "or_name" if or_name else "always"})


def _aside(default: Any) -> Any:
    """A key that names, places or continues a run but changes no number of it."""
    return field(default=default, metadata={"aside": True})


def _check(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        shown = "null" if value is None else value
        raise ConfigError(f"{key} is {shown}, but it must be {rule}.")


def _is_endpoint(url: str) -> bool:
    """Whether a text is an address of HTTP with nothing in it that could be a secret."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    whole = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    bare = not any(mark in url for mark in "@?#")
    return whole and bare and re.fullmatch(r"[!-~]+", url) is not None


def _check_count(group: str, owner: object, *names: str, least: int = 1) -> None:
    """Each named key is null or a whole number of at least ``least``."""
    for name in names:
        value = getattr(owner, name)
        _check(value is None or value >= least, f"{group}.{name}", value, f"{least} or more")


@dataclass
class DataConfig:
    """Where the rows come from, how they are split, and how large a photograph may be."""

    db_path: Any = field(default=None, metadata={"path": "always"})
    """Job database (SQLite), or a list of them; null is the sample, rendered at its first use."""
    source_dir: str | None = _path()
    """Folder of the photographs; null with the sample."""
    analysis_dir: str | None = _path()
    """Folder of the ``analysis-<advisor>-<job_id>.md`` files; null with the sample."""
    advisor: str | None = "ansel"
    """Whose critiques to learn; null is every advisor together, for one adapter."""
    output_dir: str | None = _path()
    """Where manifest, splits and link report are written; null is ``data/`` in the run folder."""
    manifest: str | None = _path()
    """A manifest to prepare from; null is the one ``link`` wrote in ``output_dir``."""
    train_data: str | None = _path()
    """A prepared JSON file to train on, instead of what ``prepare`` wrote."""
    val_data: str | None = _path()
    """A prepared JSON file to validate and evaluate on, instead of what ``prepare`` wrote."""
    train_split: float = 0.8
    """Share of the photographs for training, 0 to 1; the three shares add up to 1."""
    val_split: float = 0.2
    """Share for validation, 0 to 1."""
    test_split: float = 0.0
    """Share kept for the final evaluation, 0 to 1; with 0 the validation part is evaluated."""
    accept: Accept = Accept.mended
    """What a stored analysis must be: ``strict`` is JSON as it should be; ``mended`` is complete,
    whatever had to be mended; ``all`` may lack texts, but no score. Mends are in the manifest."""
    generated: bool = False
    """Link analyses that our own service wrote as well; without it they are left out, so that a
    model does not learn from its own answers."""
    limit: int | None = None
    """Most rows to link, for a quick try; null is all."""
    max_pixels: int = 1_310_720
    """Most pixels of a photograph as the model sees it; larger ones are scaled down."""
    min_pixels: int = 3_136
    """Fewest pixels of a photograph as the model sees it; smaller ones are scaled up."""
    seed: int = 0
    """Seed of the split (and of the sample's photographs), 0 or more."""
    drop: list[str] = field(default_factory=list)
    """Findings of the audit whose rows are left out when preparing, such as template_scores."""
    prompt_example: PromptExample = PromptExample.keep
    """``strip`` takes the scores out of a filled example in the prompt; ``keep`` leaves them."""
    dimension_map: dict[str, str | None] = field(default_factory=dict)
    """What to call a dimension instead of what a critique calls it; null leaves it out."""
    folds: int | None = None
    """Deal the photographs outside the test part into so many folds as well, 2 or more."""
    fold: int | None = None
    """The fold to validate on, from 0, training on the others; null is the split's own parts."""
    require_informative: bool = False
    """Refuse labels that cannot teach scoring, instead of only saying so."""

    def __post_init__(self) -> None:
        shares = {f"data.{part}_split": getattr(self, f"{part}_split") for part in _PARTS}
        for key, share in shares.items():
            _check(0.0 <= share <= 1.0, key, share, "between 0 and 1")
        if not math.isclose(total := sum(shares.values()), 1.0, abs_tol=1e-6):
            parts = " + ".join(f"{key} {share:g}" for key, share in shares.items())
            raise ConfigError(f"{parts} is {total:g}, but the three shares must add up to 1.")
        _check_count("data", self, "limit", "min_pixels", "max_pixels")
        _check_count("data", self, "seed", least=0)
        _check(
            self.min_pixels <= self.max_pixels,
            "data.min_pixels",
            self.min_pixels,
            f"at most data.max_pixels, {self.max_pixels}",
        )
        _check(self.advisor != "", "data.advisor", "empty", "an advisor's id, or null for all")
        self._check_folds()
        self._check_drop()
        self._check_sources()

    def _check_folds(self) -> None:
        _check_count("data", self, "folds", least=2)
        _check_count("data", self, "fold", least=0)
        if self.fold is not None:
            if self.folds is None:
                raise ConfigError(
                    f"data.fold is {self.fold} but data.folds is null; say of how many with "
                    "data.folds=5."
                )
            if named := self.train_data or self.val_data:
                raise ConfigError(
                    f"data.fold chooses among prepared rows, but {named} is given as well; leave "
                    "out data.fold, or data.train_data and data.val_data."
                )
            rule = f"below data.folds, {self.folds}; folds count from 0"
            _check(self.fold < self.folds, "data.fold", self.fold, rule)
        for name, new in self.dimension_map.items():
            blank = not name.strip() or (new is not None and not new.strip())
            _check(not blank, f"data.dimension_map.{name}", new or "empty", "a name, or null")

    def _check_drop(self) -> None:
        for name in self.drop:
            if name not in DROPPABLE:
                meant = nearest(name, DROPPABLE)
                hint = f"did you mean {meant}?" if meant else f"there are {', '.join(DROPPABLE)}."
                raise ConfigError(f"data.drop names {name}, which no finding can drop; {hint}")

    def _check_sources(self) -> None:
        paths = self.db_path if isinstance(self.db_path, list) else [self.db_path]
        if self.db_path is not None:
            _check(
                bool(paths) and all(isinstance(path, str) and path for path in paths),
                "data.db_path",
                self.db_path,
                "a path or a list of paths",
            )
        folders = {
            "data.source_dir": self.source_dir,
            "data.analysis_dir": self.analysis_dir,
        }
        if self.db_path is None:
            for key, value in folders.items():
                if value is not None:
                    raise ConfigError(
                        f"{key} is {value} but data.db_path is null, which means the embedded "
                        "sample; set data.db_path to the job database those files belong to."
                    )
        elif missing := [key for key, value in folders.items() if value is None]:
            raise ConfigError(
                f"data.db_path is {self.db_path} but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} null; set data.source_dir to the folder "
                "of its photographs and data.analysis_dir to the folder of its analyses."
            )


@dataclass
class ModelConfig:
    """The base model."""

    path: str | None = _path(or_name=True)
    """A model folder or a Hugging Face id; null is the embedded sample model."""
    dtype: DType = DType.auto
    """Floating-point type of the weights."""
    quantize_bits: int | None = None
    """4 or 8 quantises the frozen base while loading it; null leaves it as it is."""
    allow_other_precision: bool = False
    """Use an adapter on its base though that is quantised otherwise than it was trained on; every
    use is told as a warning, and its recorded logits are not compared."""

    def __post_init__(self) -> None:
        bits = self.quantize_bits
        _check(bits in (None, 4, 8), "model.quantize_bits", bits, "4, 8 or null")
        _check(self.path != "", "model.path", "empty", "a folder, an id, or null for the sample")


@dataclass
class LoraConfig:
    """The low-rank adapter (Hu et al. 2021)."""

    rank: int = 16
    """Rank r of the update, 1 or more."""
    alpha: float = 32.0
    """Numerator of the scale, above 0: alpha / rank, or alpha / sqrt(rank) with ``rslora``."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped while training, 0 up to but not including 1."""
    target_modules: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )
    """The language model's linear layers that get an adapter: last names, or regular expressions
    for whole names such as ``.*layers\\.[0-3]\\.self_attn\\..*``."""
    layers: list[str] | None = None
    """Decoder layers that get one, numbers and ranges such as [0-3,35]; null is all of them."""
    vision: list[str] = field(default_factory=list)
    """Linear layers of the vision tower and its mergers that get one as well: last names (qkv,
    proj, linear_fc1, linear_fc2), or regular expressions for whole names such as ``.*merger.*``.
    Empty leaves the tower frozen, and each photograph goes through it once."""
    method: LoraMethod = LoraMethod.lora
    """How the scale follows from alpha and rank."""
    plus: float = 1.0
    """How many times the learning rate the matrices B move with, 1 or more: LoRA+ (Hayou et al.
    2024), whose authors advise 16."""

    def __post_init__(self) -> None:
        _check_count("lora", self, "rank")
        _check(self.alpha > 0 and math.isfinite(self.alpha), "lora.alpha", self.alpha, "above 0")
        _check(self.plus >= 1 and math.isfinite(self.plus), "lora.plus", self.plus, "1 or more")
        _check(0.0 <= self.dropout < 1.0, "lora.dropout", self.dropout, "at least 0 and below 1")
        targets = self.target_modules
        _check(
            (len(targets) > 0 or len(self.vision) > 0)
            and len(set(targets)) == len(targets)
            and all(targets),
            "lora.target_modules",
            targets,
            "a list of different layer names, one at least where lora.vision is empty",
        )
        _check(
            len(set(self.vision)) == len(self.vision) and all(self.vision),
            "lora.vision",
            self.vision,
            "a list of different layer names, which may be empty",
        )
        if self.layers is not None:
            rule = "null, or a list of numbers and rising ranges such as [0-3,35]"
            entries = [re.fullmatch(r"(\d+)(?:-(\d+))?", one) for one in self.layers]
            rising = all(e and int(e[1]) <= int(e[2] or e[1]) for e in entries)
            _check(bool(entries) and rising, "lora.layers", self.layers, rule)
            if not targets:
                raise ConfigError(
                    f"lora.layers is {self.layers} but lora.target_modules is empty, so there is "
                    "nothing for it to choose among; leave it out."
                )


@dataclass
class OptimizerConfig:
    """How weights move; every count is in optimizer updates, not micro-batches."""

    name: OptimizerName = OptimizerName.adamw
    """``adamw`` with bias correction (Loshchilov & Hutter 2019), ``adam`` (Kingma & Ba 2015), which
    decays no weights, or ``muon`` (Jordan et al. 2024), which moves matrices only."""
    learning_rate: float = 2e-4
    """Peak rate, above 0, reached at the end of the warm-up."""
    vision_learning_rate: float | None = None
    """The same for what ``lora.vision`` names, above 0; null is ``learning_rate``."""
    weight_decay: float = 0.01
    """Weight decay, 0 or more: decoupled with ``adamw``, added to the gradient with ``muon``."""
    warmup_steps: int = 100
    """Updates over which the rate rises from 0 to its peak, 0 or more."""
    schedule: Schedule = Schedule.cosine
    """How the rate falls from the end of the warm-up to the last update."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down, above 0."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            _check(value > 0 and math.isfinite(value), f"optimizer.{name}", value, "above 0")
        value = self.vision_learning_rate
        fine = value is None or (value > 0 and math.isfinite(value))
        _check(fine, "optimizer.vision_learning_rate", value, "above 0, or null")
        decay = self.weight_decay
        _check(decay >= 0 and math.isfinite(decay), "optimizer.weight_decay", decay, "0 or more")
        if decay and self.name == OptimizerName.adam:
            raise ConfigError(
                f"optimizer.weight_decay is {decay:g}, but optimizer.name is adam, which decays no "
                "weights; set optimizer.weight_decay=0, or optimizer.name=adamw."
            )
        _check_count("optimizer", self, "warmup_steps", least=0)


@dataclass
class TrainerConfig:
    """How long to train, in what portions, and when to save and look."""

    epochs: int = 3
    """Passes over every training row, 1 or more."""
    max_steps: int | None = None
    """Updates to stop after, though the epochs are not over; null is no such limit."""
    batch_size: int = 2
    """Rows per micro-batch, 1 or more."""
    accumulate: int = 1
    """Micro-batches per update, 1 or more, weighted by their supervised tokens."""
    save_every: int = 250
    """Updates between checkpoints, 1 or more; the last one is always saved."""
    eval_every: int | None = None
    """Updates between evaluations (validation loss, monitor); null is once an epoch."""
    patience: int | None = None
    """Evaluations without a better ``monitor`` before stopping; null never stops early."""
    monitor: Monitor = Monitor.val_loss
    """What tells the best checkpoint: ``val_loss``, or of free greedy answers to ``monitor_rows``
    validation rows ``format_compliance`` (larger is better) or ``score_mae`` (smaller is)."""
    monitor_rows: int = 16
    """Validation rows answered at each evaluation with a ``monitor`` other than ``val_loss``, 1 or
    more."""
    max_bad_steps: int = 3
    """Updates in a row that are left out because loss or gradient is not finite or a spike, 0 or
    more; one more ends the run."""
    spike: float | None = 10.0
    """Times the median of the latest 64 updates above which a loss or gradient norm is a spike,
    above 1; null knows none."""
    ema: float | None = None
    """Decay of an average of the adapter over the updates, above 0 and below 1, which is evaluated
    and kept in the adapter's place; null keeps the adapter itself."""
    grad_checkpoint: bool = False
    """Recompute each layer in the backward pass: about a third more time for less memory."""
    overfit: int | None = None
    """Learn so many batches by heart instead of training, to see whether anything can be learnt,
    1 or more; null trains."""
    seed: int = 0
    """Seed of the adapter's initial weights, the batches and the dropout, 0 or more."""
    resume: str = field(default="never", metadata={"aside": True, "path": "or_name"})
    """``never``, a checkpoint, or ``auto``: the newest whole checkpoint of ``task.output_dir``, or
    where that is null, of the newest run of this experiment that was not finished."""
    peer_timeout: float = _aside(600.0)
    """Seconds that a process waits for the others it trains with (``mlx.launch``), above 0."""

    def __post_init__(self) -> None:
        value = self.peer_timeout
        _check(0 < value < math.inf, "trainer.peer_timeout", value, "above 0")
        _check_count("trainer", self, "epochs", "max_steps", "batch_size", "accumulate")
        _check_count("trainer", self, "save_every", "eval_every", "patience")
        _check_count("trainer", self, "monitor_rows", "overfit")
        _check_count("trainer", self, "seed", "max_bad_steps", least=0)
        value = self.spike
        _check(value is None or 1 < value < math.inf, "trainer.spike", value, "above 1, or null")
        value = self.ema
        _check(value is None or 0 < value < 1, "trainer.ema", value, "above 0 and below 1, or null")
        _check(self.resume != "", "trainer.resume", "empty", "never, auto or a checkpoint's path")


@dataclass
class EvalConfig:
    """How base and tuned model are compared."""

    max_examples: int | None = None
    """Most held-out photographs to judge; null is all."""
    max_tokens: int | None = None
    """Most tokens of an answer; null is the longest reference and a margin."""
    temperature: float = 0.0
    """Sampling temperature, 0 or more; 0 is greedy, which repeats exactly."""
    batch_size: int = 16
    """Photographs answered at once, 1 or more."""
    arms: list[Arm] = field(default_factory=lambda: [Arm.base, Arm.tuned])
    """Models to compare: ``base``, ``tuned``, ``production`` (what ``eval.against`` means in the
    registry) and ``base_examples`` (the base, shown some critiques); each with ``_constrained``
    behind it answers under the critique's schema."""
    against: str | None = _aside("production")
    """Channel or version of the registry that is compared with as the arm ``production``; by itself
    where it means another adapter of the same base. null leaves it to ``eval.arms``."""
    latency: int = _aside(10)
    """Photographs that each arm answers singly, to time tokens arm beside arm, 0 or more."""
    constrained: bool = False
    """Answer with every arm a second time under the schema, as ``<arm>_constrained``."""
    examples: int = 2
    """Training critiques that ``base_examples`` is shown in its prompt, 1 or more."""
    folds: int | None = None
    """Train this many adapters, each judged on the photographs it was not trained on, 2 or more;
    null trains one."""
    seeds: int = 1
    """Train with this many seeds, from ``trainer.seed`` on, and judge them together, 1 or more."""
    margin_score: float = 0.25
    """Points of 0-10 by which the score error may rise and still be no worse, 0 or more."""
    margin_format: float = 0.02
    """Share of answers by which exact format may fall and still be no worse, 0 to 1."""
    report: str | None = _path()
    """Path of comparison_report.json; null puts it into the run folder as ``evaluation/``."""
    judge_url: str | None = _aside(None)
    """OpenAI-compatible endpoint of a model that compares the answers; null asks none."""
    judge_model: str | None = None
    """The judge's name at that endpoint."""
    judge_key_env: str = _aside("OPENAI_API_KEY")
    """Environment variable with the endpoint's key; one that is not set sends none."""
    judge_timeout: float = _aside(60.0)
    """Seconds to wait for each of the judge's answers, above 0."""

    def __post_init__(self) -> None:
        _check_count("eval", self, "max_examples", "max_tokens", "batch_size", "examples", "seeds")
        _check_count("eval", self, "folds", least=2)
        _check_count("eval", self, "latency", least=0)
        _check(self.against != "", "eval.against", "empty", "a channel, a version, or null")
        value = self.temperature
        _check(value >= 0 and math.isfinite(value), "eval.temperature", value, "0 or more")
        value = self.margin_score
        _check(value >= 0 and math.isfinite(value), "eval.margin_score", value, "0 or more")
        value = self.margin_format
        _check(0 <= value <= 1, "eval.margin_format", value, "a share of answers, 0 to 1")
        arms = self.arms
        _check(
            len(arms) > 0 and len(set(arms)) == len(arms),
            "eval.arms",
            arms,
            "a list of different arms, one at least",
        )
        self._check_judge()

    def _check_judge(self) -> None:
        value = self.judge_timeout
        _check(value > 0 and math.isfinite(value), "eval.judge_timeout", value, "above 0")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.judge_key_env):
            # It may be the key, which must not be shown.
            raise ConfigError(
                "eval.judge_key_env must be the name of an environment variable, such as "
                "OPENAI_API_KEY, and never the key itself."
            )
        if self.judge_url is None:
            if self.judge_model is not None:
                raise ConfigError(
                    f"eval.judge_model is {self.judge_model} but eval.judge_url is null, so nobody "
                    "is asked; set eval.judge_url to the endpoint, such as http://localhost:8000/v1."
                )
            return
        if not _is_endpoint(self.judge_url):
            raise ConfigError(
                "eval.judge_url must be a plain http or https address, such as "
                "http://localhost:8000/v1, without a user, a query or a key in it."
            )
        if not self.judge_model:
            raise ConfigError(
                "eval.judge_url is set but eval.judge_model is not; set it to the name that the "
                "endpoint has for the model."
            )
        if not {Arm.base, Arm.tuned} <= set(self.arms):
            raise ConfigError(
                "eval.judge_url is set but eval.arms has not both base and tuned, which the judge "
                "compares; set eval.arms=[base,tuned]."
            )


@dataclass
class TrackingConfig:
    """Weights & Biases; the same numbers always go to training_log.jsonl as well."""

    mode: TrackingMode = TrackingMode.auto
    """``auto`` never asks for a key; ``disabled`` leaves only training_log.jsonl."""
    project: str = "mondrian_ft"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is the account's default."""
    group: str | None = None
    """W&B group; null groups the jobs of one sweep."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    tensorboard: bool = False
    """Write the numbers as TensorBoard's event files too, into ``tensorboard/`` of the run folder;
    needs the extra ``tensorboard``."""


@dataclass
class GateConfig:
    """What an adapter must have shown to be promoted."""

    inconclusive: Undecided = Undecided.refuse
    """``refuse`` or ``allow`` one whose score error cannot be told apart from what it replaces."""
    no_worse: Undecided = Undecided.refuse
    """The same for one that is no worse within ``eval.margin_score``, and not better."""
    latency: float = 0.10
    """How much longer a token may take, as a share, 0 or more; refused only where the lower end of
    the 95 % interval is above it."""

    def __post_init__(self) -> None:
        value = self.latency
        _check(value >= 0 and math.isfinite(value), "registry.gate.latency", value, "0 or more")


@dataclass
class RegistryConfig:
    """Where finished adapters are numbered and kept."""

    root: str = _path("outputs/registry")
    """Folder of the registry."""
    name: str | None = None
    """Name the versions are counted under; null is ``<model>-<advisor>``."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What ``task=promote`` asks for."""
    mirror: str | None = _path()
    """Folder kept in the workbook's layout: ``versions/<name>-v1``, … and the link
    ``<name>-active`` to what ``production`` means; null keeps none."""


@dataclass
class ServeConfig:
    """The advisor service: what it takes, from whom, and where it keeps its own files."""

    upload_dir: str | None = _path()
    """A folder that ``image_path`` may lead into, besides ``data.source_dir``; null is none."""
    keep_uploads: bool = False
    """Keep photographs that are uploaded without a ``job_id`` in ``upload_dir``, under the name in
    their new row of the job database, so that linking finds them with that ``data.source_dir``."""
    state_dir: str = _path("outputs/service")
    """Folder of the service's own files: the secret of the A/B draw, its tally, the service's id,
    the votes."""
    token: str | None = field(default=None, metadata={"secret": True})
    """Asked of every request but the page and /health; null asks for ``token_env``'s, if set."""
    token_env: str = "MONDRIAN_FT_TOKEN"
    """Environment variable with the token, which no other user of the machine can see there."""
    hosts: list[str] = field(default_factory=list)
    """More names that clients reach the service by, such as a proxy's."""
    # Typed as a dict, Hydra would let no command line put a key into it.
    adapters: Any = None
    """Versions or channels of single advisors, before ``task.adapter``: {ansel: production}; null
    is none."""
    max_queue: int = 64
    """Answers waiting or under way together, 1 or more; a request for three advisors counts as
    three. What does not fit is refused (429)."""
    deadline: float | None = 120.0
    """Seconds after which an answer is given up and its generation stopped; null waits."""
    max_tokens: int | None = None
    """Most tokens of an answer; null is the model's own limit."""
    constrained: bool = True
    """Keep answers to the critique's schema while they are generated."""
    max_upload_mb: int = 25
    """Most megabytes (10^6 bytes) of a photograph, 1 or more."""
    upload_seconds: float = 30.0
    """Seconds in which a request must have been sent, above 0."""
    max_requests: int = 512
    """Requests under way at once, also those still being sent, 1 or more; more are answered 503."""

    def __post_init__(self) -> None:
        _check_count("serve", self, "max_queue", "max_tokens", "max_upload_mb", "max_requests")
        for name in ("deadline", "upload_seconds"):
            value = getattr(self, name)
            fine = value is None or (value > 0 and math.isfinite(value))
            _check(fine, f"serve.{name}", value, "above 0")
        if self.keep_uploads and self.upload_dir is None:
            raise ConfigError("serve.keep_uploads=true needs a folder; set serve.upload_dir.")
        # The value is not shown: it is a secret.
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ConfigError(
                "serve.token is empty or holds a space or a letter that no header can; leave it "
                "out, or draw one with: openssl rand -hex 16"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_env):
            raise ConfigError(
                "serve.token_env must be the name of an environment variable, never the token."
            )
        if self.adapters is not None:
            rule = "advisors' ids with a version or channel each: {ansel: production}"
            _check(isinstance(self.adapters, dict), "serve.adapters", self.adapters, rule)
            for advisor, name in self.adapters.items():
                fine = isinstance(name, str) and bool(name.strip())
                _check(fine, f"serve.adapters.{advisor}", name, "a version or channel")


@dataclass
class Config:
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    task: Task = field(default_factory=Task)
    experiment_name: str = "sample"
    """Name of the run folder's parent; experiment files set it."""

    def __post_init__(self) -> None:
        _check(
            re.fullmatch(r"\w[\w.-]*", self.experiment_name) is not None,
            "experiment_name",
            self.experiment_name or "empty",
            "a plain folder name of letters, digits, '_', '.' and '-'",
        )
        if self.optimizer.name == OptimizerName.muon and self.lora.method == LoraMethod.dora:
            raise ConfigError(
                "optimizer.name is muon, which moves matrices, but lora.method is dora, which also "
                "trains a vector of magnitudes; use optimizer.name=adamw."
            )
        rate = self.optimizer.vision_learning_rate
        if rate is not None and not (self.lora.vision and self.lora.target_modules):
            empty, what = "lora.vision", "the tower does not move"
            if self.lora.vision:
                empty, what = "lora.target_modules", "optimizer.learning_rate is the tower's"
            raise ConfigError(
                f"optimizer.vision_learning_rate is {rate:g} but {empty} is empty, so {what}; "
                "leave it out."
            )
        if self.eval.judge_url is not None and self.eval.seeds > 1:
            raise ConfigError(
                f"eval.seeds={self.eval.seeds} answers every row as often, which is more than "
                "eval.judge_url can be asked about; leave out one of them."
            )
        if (folds := self.eval.folds) is not None:
            if self.data.fold is not None:
                raise ConfigError(
                    f"eval.folds={folds} judges every fold and data.fold={self.data.fold} one; "
                    "leave out one of them."
                )
            rule = f"null or eval.folds, {folds}"
            _check(self.data.folds in (None, folds), "data.folds", self.data.folds, rule)


_PARTS = ("train", "val", "test")

GROUPS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "optimizer": OptimizerConfig,
    "trainer": TrainerConfig,
    "eval": EvalConfig,
    "tracking": TrackingConfig,
    "registry": RegistryConfig,
    "serve": ServeConfig,
}
"""The config groups with one schema each; ``task`` has one per task."""
