"""What ``--help`` prints.

Written here and not left to Hydra, whose own page composes the config, restates all of it, and
takes more than a second to list the groups.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from .config import conf_dir
from .schema import GROUPS
from .tasks import TASKS

_TEMPLATE = """\
mondrian_ft: LoRA fine-tuning of a vision-language model into a photography advisor, on MLX

  python -m mondrian_ft [+experiment=NAME] [task=NAME] [group=option] [group.key=value] [-m]
  mondrian-ft            the same, from any folder

With nothing said it runs the whole main job on an embedded sample, with no network: link,
prepare, train, evaluate base against tuned, register the adapter, write a report.

TASKS (task=NAME, and their keys)
{tasks}

GROUPS (group=option; * is chosen when nothing is said)
{groups}

EXAMPLES
  python -m mondrian_ft                                   the sample, some three minutes
  python -m mondrian_ft +experiment=dry_run               five rows, to see that it all runs
  python -m mondrian_ft +experiment=ansel_v1              Qwen3-VL-4B on ./mondrian/
  python -m mondrian_ft '+experiment=[ansel_v1,dry_run]'  that one, on five rows
  python -m mondrian_ft task=link data=mondrian data.output_dir=./training_data
  python -m mondrian_ft lora.rank=8 trainer.epochs=5      any key, by hand
  python -m mondrian_ft -m lora.rank=4,8,16               one run for each, ranked
  python -m mondrian_ft +sweep=rank_lr                    a sweep that is written down

EXPERIMENTS OF YOUR OWN
  Write the keys that differ into my_conf/experiment/NAME.yaml, under the first line
  '# @package _global_', and add it: --config-dir my_conf +experiment=NAME

MORE
  --cfg job            print every key and its value, run nothing
  -m, --multirun       sweep the values separated by commas; hydra/sweeper=optuna searches
  --config-dir DIR     look for groups and experiments in DIR as well
  --version            this program's version
  --hydra-help         the other flags, from Hydra
  exit codes           0 done, 1 the run failed, 2 the config is wrong, 130 interrupted
  HYDRA_FULL_ERROR=1   in the environment, shows the traceback of an error
"""


def text(argv: Sequence[str] = ()) -> str:
    """The help page; ``argv`` may name a ``--config-dir``, whose files are listed too."""
    return _TEMPLATE.format(tasks=_tasks(), groups=_groups(config_dirs(argv)))


def config_dirs(argv: Sequence[str]) -> list[Path]:
    """Folders given with ``--config-dir`` (or Hydra's short ``-cd``)."""
    found = []
    for place, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            found.append(Path(value or " ".join(argv[place + 1 : place + 2])))
    return found


def options(group: str, more: Sequence[Path] = ()) -> list[str]:
    """What ``group=`` may be: the YAML files of that group, in ours and in ``more`` folders."""
    inside = conf_dir()
    if inside.startswith("pkg://"):
        ours = resources.files(inside.removeprefix("pkg://"))
    else:
        ours = Path(inside)
    names = set()
    for folder in (ours.joinpath(group), *(Path(root) / group for root in more)):
        if folder.is_dir():
            names |= {item.name for item in folder.iterdir() if item.name.endswith(".yaml")}
    return sorted(name.removesuffix(".yaml") for name in names)


DEFAULTS = {
    "data": "sample",
    "model": "sample",
    "lora": "all_linear",
    "optimizer": "adamw",
    "trainer": "default",
    "eval": "default",
    "tracking": "wandb",
    "registry": "default",
    "serve": "default",
}
"""What config.yaml chooses, for the asterisks; a test holds the two together."""


def _tasks() -> str:
    wide = max(map(len, TASKS))
    lines = []
    for name, task in TASKS.items():
        first = (task.__doc__ or "").strip().splitlines()[0].rstrip(".")
        lines.append(f"  {name:<{wide}}  {first}")
        if mine := [f"task.{item.name}" for item in dataclasses.fields(task)]:
            indent = " " * (wide + 6)
            lines.append(
                textwrap.fill(" ".join(mine), 100, initial_indent=indent, subsequent_indent=indent)
            )
    return "\n".join(lines)


def _groups(more: Sequence[Path]) -> str:
    lines = []
    for group in (*GROUPS, "experiment", "sweep"):
        marked = [f"{o}*" if DEFAULTS.get(group) == o else o for o in options(group, more)]
        name = f"+{group}" if group in ("experiment", "sweep") else group
        lines.append(f"  {name:<11}  {', '.join(marked)}")
    return "\n".join(lines)
