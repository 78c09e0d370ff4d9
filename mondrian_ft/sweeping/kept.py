"""Whether a finished job still stands: trained on the same rows, from the same base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from ..config import Config
from ..data.corrections import CORRECTIONS_NAME
from ..data.dataset import LOCK_NAME
from ..errors import MondrianError
from ..tasks import Experiment, Train

if TYPE_CHECKING:
    from ..run import Run


class Standing:
    """Compares finished jobs with what their data and base are now; looks at each once.

    Args:
        folder: of the sweep, for what linking writes; it is removed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locks: dict[str, str] = {}
        self._bases: dict[str, str | None] = {}

    def changed(self, config: Config, facts: Mapping[str, Any]) -> str | None:
        """Why a job whose run.json is ``facts`` has to be run again; None if it stands."""
        if not isinstance(config.task, Experiment | Train) or config.trainer.overfit is not None:
            return "only trainings are kept"
        if "data_lock" not in facts:
            return "it does not say what it was trained on"
        weights = (facts.get("base") or {}).get("weights")
        if weights != self._weights(config, weights):
            return "its base model has changed"
        adapter = (facts.get("adapter") or {}).get("folder")
        if adapter is not None and not (Path(adapter) / "manifest.json").is_file():
            return "its adapter is gone"
        try:
            now = self._lock(config)
        except MondrianError as error:
            return f"its data cannot be read ({error})"
        return None if facts["data_lock"] == now else "its data have changed"

    def now(self, config: Config) -> dict[str, Any]:
        """The data lock and the base of a training as they are; empty for any other task.

        Raises:
            MondrianError: the data cannot be linked or read.
        """
        if not isinstance(config.task, Experiment | Train):
            return {}
        return {"data lock": self._lock(config), "base weights": self._weights(config, None)}

    def _weights(self, config: Config, then: str | None) -> str | None:
        """The base's fingerprint now; of one that is not in a folder here, what it was."""
        from ..model.base import weights_fingerprint
        from ..sample import model_dir

        folder = Path(config.model.path) if config.model.path else model_dir()
        if not folder.is_dir():
            return then
        if str(folder) not in self._bases:
            self._bases[str(folder)] = weights_fingerprint(folder)
        return self._bases[str(folder)]

    def _lock(self, config: Config) -> str:
        """The data lock that the job would have now."""
        from ..pipeline import rows

        key = json.dumps(
            [type(config.task).__name__, config.eval.folds, asdict(config.data)], default=str
        )
        if key not in self._locks:
            with TemporaryDirectory(prefix=".linking-", dir=self.folder) as place:
                quiet = cast("Run", _Quiet(Path(place)))
                data = config.data
                prepared = data.output_dir
                if isinstance(config.task, Train) and prepared is not None:
                    # Reads what was prepared, and writes nothing.
                    self._locks[key] = rows.load(config, quiet).lock
                else:
                    for name in (LOCK_NAME, CORRECTIONS_NAME):
                        if prepared is not None and (Path(prepared) / name).is_file():
                            shutil.copy(Path(prepared) / name, Path(place) / name)
                    here = replace(config, data=replace(data, output_dir=place))
                    self._locks[key] = rows.linked_and_prepared(here, quiet).lock
        return self._locks[key]


class _Quiet:
    """As much of a run as linking and preparing ask for; it says nothing and keeps nothing."""

    def __init__(self, folder: Path) -> None:
        from rich.console import Console

        self.folder = folder
        self.console = Console(quiet=True)

    def record(self, **facts: Any) -> None:
        pass

    def warn(self, sentence: str) -> None:
        pass
