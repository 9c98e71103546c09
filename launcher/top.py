"""`mmpretrain top`: all runs, live, from their heartbeats.

Enter: folders. Leave: a table that is drawn again each second or so, until it is interrupted.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.history import History
from launcher.progress import duration
from launcher.status import RunStatus, colour_of, find_runs, status_of, table_of

_EVENTS = 5
_BAR_WIDTH = 30


def top(roots: Sequence[Path], every_s: float, times: int | None = None) -> None:
    """Draw until interrupted, or so many times."""
    console = Console()
    drawn = 0
    with Live(view(roots), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while times is None or drawn < times:
            live.update(view(roots), refresh=True)
            drawn += 1
            if times is None or drawn < times:
                time.sleep(every_s)


def view(roots: Sequence[Path]) -> RenderableType:
    """The table, how far the runs are that go on, and what happened last."""
    runs = [status_of(run, roots) for run in find_runs(roots)]
    parts: list[RenderableType] = [_head(runs), Text(), table_of(runs)]
    for title, rows in (("on the way", _bars(runs)), ("what happened last", _events(runs))):
        if rows is not None:
            parts += [Text(), Text(title, style="bold"), rows]
    return Group(*parts)


def _head(runs: Sequence[RunStatus]) -> Text:
    """The time, and how many runs are in each state."""
    head = Text(time.strftime("%H:%M:%S"), style="bold")
    for state, count in Counter(run.state for run in runs).items():
        head.append(f"  {count} {state}", style=colour_of(state))
    return head


def _bars(runs: Sequence[RunStatus]) -> Table | None:
    going = [(run, run.heartbeat) for run in runs if run.state == "running" and run.heartbeat is not None]
    if not going:
        return None
    bars = Table.grid(padding=(0, 2))
    for run, beat in going:
        bar = ProgressBar(beat.last_step, beat.step, width=_BAR_WIDTH, complete_style="green")
        bars.add_row(run.name, bar, f"{beat.step / max(1, beat.last_step):.0%}", beat.phase)
    return bars


def _events(runs: Sequence[RunStatus]) -> Table | None:
    """The newest ends of attempts, the last one first."""
    newest = sorted(_ended(runs), key=lambda one: -one[0])[:_EVENTS]
    if not newest:
        return None
    now, table = time.time(), Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim", justify="right")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for ended, name, story in newest:
        table.add_row(f"{duration(now - ended)} ago", name, story)
    return table


def _ended(runs: Sequence[RunStatus]) -> Iterator[tuple[float, str, Text]]:
    for run in runs:
        for attempt in History(run.run).read():
            story = Text(f"attempt {attempt.attempt} ")
            story.append(attempt.ending, style=colour_of(attempt.ending))
            yield attempt.ended, run.name, story.append(f": {attempt.reason}")
