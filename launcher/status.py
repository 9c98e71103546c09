"""Every run under a folder at a glance: heartbeats, history and the queue, joined; no accounting database.

Enter: folders. Leave: a row for each run folder below them, newest first. Refused: a folder without runs.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from launcher.backends.base import Standing, standing
from launcher.history import Action, Attempt, Ending, History
from launcher.progress import duration, seconds_left
from launcher.spec import JobState
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError
from mmpretrain.core.run_files import Heartbeat

_DEPTH = 4
_MARKS = (run_files.ATTEMPTS, "launch/job.json")
_FRESH_S = 120.0
"""A run of no launcher counts as running for so long after its last heartbeat."""
_COLOURS = {
    "running": "green",
    "completed": "cyan",
    **dict.fromkeys(("queued", "starting", "ending", "submitted", "stopped", "preempted"), "yellow"),
    **dict.fromkeys(("crashed", "fatal", "hung", "lost", "unfit", "unreadable"), "red"),
}
_FIGURES = ("step", "samples/s", "loss", "left", "attempts")
_FOLDED = ("nodes", "detail")


@dataclass(frozen=True)
class RunStatus:
    """What can be said of one run now."""

    run: Path
    name: str
    """Short, and unlike those of its siblings."""
    state: str
    detail: str
    heartbeat: Heartbeat | None
    attempts: int
    nodes: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table shows them."""
        beat = self.heartbeat
        if beat is None:
            return (self.name, self.state, "", "", "", "", str(self.attempts), self.nodes, self.detail)
        left = seconds_left(beat) if self.state == "running" else None
        return (
            self.name,
            self.state,
            f"{beat.step}/{beat.last_step}",
            "" if beat.samples_per_s is None else f"{beat.samples_per_s:.4g}",
            "" if beat.loss is None else f"{beat.loss:.4g}",
            "" if left is None else duration(left),
            str(self.attempts),
            self.nodes,
            self.detail,
        )


def find_runs(roots: Sequence[Path]) -> list[Path]:
    """Run folders at or below the roots, by name."""
    found = sorted({run for root in roots for run in _below(root, _DEPTH)})
    if not found:
        raise ClusterError(f"there are no runs under {', '.join(map(str, roots))}; name the folder that holds them")
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in _MARKS):
        yield folder
    elif depth and folder.is_dir():
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _below(child, depth - 1)


def status_of(run: Path, roots: Sequence[Path] = ()) -> RunStatus:
    """Join what the run, its supervisor and the scheduler say; its name is told from the root it lies in.

    Records that cannot be read are told as the state of the run, since others may stand beside it.
    """
    try:
        return _read_status(run, roots)
    except ClusterError as fault:
        return RunStatus(run, _name(run, roots), "unreadable", str(fault), None, 0, "")


def _read_status(run: Path, roots: Sequence[Path]) -> RunStatus:
    history = History(run)
    past, where = history.read(), standing(run)
    heartbeat = run_files.read_heartbeat(run)
    current = history.current()
    state, detail = _state(run, where, past, current, heartbeat)
    attempts = len(past) + (current is not None) or _attempts_begun(run)
    nodes = where.nodes or (",".join(current.nodes) if current is not None and state == "running" else "")
    return RunStatus(run, _name(run, roots), state, detail, heartbeat, attempts, nodes)


def _name(run: Path, roots: Sequence[Path]) -> str:
    return next((str(run.relative_to(root)) for root in roots if run != root and run.is_relative_to(root)), run.name)


def _attempts_begun(run: Path) -> int:
    """Of a run that no launcher started."""
    path = run / run_files.ATTEMPTS
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def _state(
    run: Path, where: Standing, past: Sequence[Attempt], current: Attempt | None, heartbeat: Heartbeat | None
) -> tuple[str, str]:
    if where.state is JobState.QUEUED:
        return "queued", where.reason
    if where.state is JobState.ENDING:
        return "ending", past[-1].reason if past and current is None else ""
    if where.state is JobState.RUNNING:
        begun = current is not None and heartbeat is not None and heartbeat.time >= current.began
        return ("running", heartbeat.phase) if begun and heartbeat is not None else ("starting", "")
    return _state_without_job(run, past, current, heartbeat)


def _state_without_job(
    run: Path, past: Sequence[Attempt], current: Attempt | None, heartbeat: Heartbeat | None
) -> tuple[str, str]:
    outcome = run_files.read_outcome(run)
    if current is not None:
        return "lost", f"its job is gone and left no word; start it again with: mmpretrain submit --again {run}"
    if past and past[-1].action in (Action.STOP, Action.REPLACE_NODES):
        return "stopped", past[-1].reason
    if outcome is not None:
        return ("stopped" if outcome.state == "preempted" else outcome.state), outcome.reason or outcome.message
    if past:
        return ("stopped" if past[-1].ending is Ending.PREEMPTED else str(past[-1].ending)), past[-1].reason
    if heartbeat is not None and time.time() - heartbeat.time < _FRESH_S:
        return "running", heartbeat.phase
    return ("crashed", "no outcome and no sign of life") if heartbeat is not None else ("submitted", "")


def colour_of(state: str) -> str:
    """Of a run's state, or of how an attempt ended; empty for those that are neither good nor bad."""
    return _COLOURS.get(state, "")


def table_of(runs: Sequence[RunStatus]) -> Table:
    """One row for each run; columns in which no run has anything are left out."""
    headings = ("run", "state", "step", "samples/s", "loss", "left", "attempts", "nodes", "detail")
    rows = [run.cells for run in runs]
    shown = [number for number, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    table = Table(box=None, pad_edge=False)
    for number in shown:
        folds = headings[number] in _FOLDED
        justify: Literal["left", "right"] = "right" if headings[number] in _FIGURES else "left"
        table.add_column(headings[number], justify=justify, no_wrap=not folds, overflow="fold")
    for cells in rows:
        texts = [Text(cell) for cell in cells]
        texts[1].stylize(colour_of(cells[1]))
        table.add_row(*(texts[number] for number in shown))
    return table
