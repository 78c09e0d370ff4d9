"""The dashboards of W&B: built without it, and sent only where it is online."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mondrian_ft.errors import ConfigError, MondrianError
from mondrian_ft.pipeline import dashboards
from mondrian_ft.run import Run
from mondrian_ft.schema import Config, TrackingMode
from mondrian_ft.tasks import Workspace

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def panels(spec: Any) -> list[dict[str, Any]]:
    """Every panel of a workspace as it is sent, in order."""
    return [
        panel
        for section in spec["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    ]


def test_every_panel_is_in_what_is_sent() -> None:
    """With its metrics, over updates; and it reads back as the same workspace."""
    from wandb_workspaces.workspaces import Workspace as Described

    made = dashboards.build("ours", "project", "team")
    spec = dashboards.spec(made)
    lines = [panel for panel in panels(spec) if panel["viewType"] == "Run History Line Plot"]
    wanted = [line for lines in dashboards.LINES.values() for line in lines]
    assert [panel["config"]["chartTitle"] for panel in lines] == [line.title for line in wanted]
    for panel, line in zip(lines, wanted, strict=True):
        assert panel["config"]["metrics"] == list(line.metrics)
        assert panel["config"]["xAxis"] == dashboards.AXIS
    text = json.dumps(spec)
    for name in (*dashboards.TABLES, dashboards.PAGE, f"summary:{dashboards.RESULT}"):
        assert name in text
    for key in dashboards.SETTINGS:
        assert f"config:{key.replace('.', '.value.')}" in text
    again = Described._from_model(made._to_model())
    assert dashboards.spec(again) == spec


def run(folder: Path, mode: TrackingMode = TrackingMode.offline) -> None:
    config = Config(task=Workspace())
    config.tracking.mode = mode
    config.tracking.entity = "team"
    with Run.open(config, folder) as opened:
        config.task.run(config, opened)


def test_offline_it_is_kept_and_not_sent(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path)
    assert len(panels(json.loads((tmp_path / "workspace.json").read_text()))) == 21
    assert "It is not sent, since W&B is not online here" in capsys.readouterr().out


def test_online_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Or W&B's refusal is one sentence."""
    from wandb_workspaces.workspaces import Workspace as Described

    sent: list[Any] = []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(Described, "save", lambda self: sent.append(self))
    monkeypatch.setattr(Described, "url", property(lambda self: "https://wandb.example.org/w"))
    run(tmp_path / "one", TrackingMode.online)
    assert (sent[0].entity, sent[0].project, sent[0].name) == ("team", "mondrian_ft", "mondrian_ft")
    assert "https://wandb.example.org/w" in capsys.readouterr().out

    def refuse(self: Any) -> None:
        raise ValueError("permission denied\nmore")

    monkeypatch.setattr(Described, "save", refuse)
    with pytest.raises(MondrianError, match=r"does not take the workspace \(permission denied\)"):
        run(tmp_path / "two", TrackingMode.online)


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(MondrianError, match=r"pip install 'mondrian_ft\[workspace\]'"):
        dashboards.build("ours", "project", "team")


def test_a_workspace_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"task\.title is empty"):
        Workspace(title=" ")
