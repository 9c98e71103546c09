"""A W&B workspace made from a YAML file, so that a team sees the same panels over every run.

Enter: sections of panels, each of metrics by name or by pattern. Leave: a workspace in a project, or its JSON.
Refused: a file that is no such description, W&B's workspaces library not installed, no key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from mmpretrain.core.config import Config, load_config
from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.tracking.wandb import STEP, first_line, has_credentials

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import LinePlot
    from wandb_workspaces.workspaces import Workspace


class PanelConfig(Config):
    """Curves over the steps."""

    title: str
    """Shown above it."""
    metrics: tuple[str, ...] = ()
    """Names."""
    pattern: str | None = None
    """A regular expression for whole names, instead of names."""

    @model_validator(mode="after")
    def _names_or_pattern(self) -> PanelConfig:
        if bool(self.metrics) == (self.pattern is not None):
            raise ValueError(f"panel {self.title!r} needs either metrics or a pattern")
        return self


class WorkspaceConfig(Config):
    """What a team looks at."""

    name: str = "mmpretrain"
    """Of the saved view."""
    sections: dict[str, list[PanelConfig]] = Field(min_length=1)
    """Title -> panels."""


def build(spec: Path, entity: str, project: str) -> Workspace:
    """The workspace of a file; nothing is sent anywhere."""
    config = load_config(WorkspaceConfig, spec)
    try:
        import wandb_workspaces.workspaces as workspaces
    except ImportError as fault:
        raise ConfigError(
            "W&B workspaces need a library of their own; run `pip install 'mmpretrain[workspace]'`"
        ) from fault
    sections = [
        workspaces.Section(name=title, panels=[_panel(panel) for panel in panels], is_open=True)
        for title, panels in config.sections.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name=config.name, sections=sections)


def save(workspace: Workspace) -> str:
    """Save it as a view of its project; returns its address."""
    if not has_credentials():
        raise ClusterError("W&B has no API key; `wandb login` sets one, or --dry-run prints the workspace")
    try:
        return str(workspace.save().url)  # type: ignore[no-untyped-call]
    except Exception as fault:
        raise ClusterError(f"W&B did not take the workspace ({type(fault).__name__}: {first_line(fault)})") from fault


def _panel(panel: PanelConfig) -> LinePlot:
    from wandb_workspaces.reports.v2.interface import LinePlot

    return LinePlot(title=panel.title, x=STEP, y=list(panel.metrics), metric_regex=panel.pattern)
