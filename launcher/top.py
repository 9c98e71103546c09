"""`mmpretrain top`: all runs, live, from their heartbeats.

Enter: folders. Leave: a table that is drawn again each second or so, until it is interrupted.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from launcher.history import History
from launcher.progress import duration
from launcher.status import RunStatus, find_runs, status_of, table_of

_EVENTS = 5


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
    """The table, and what happened last."""
    runs = [status_of(run) for run in find_runs(roots)]
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    head = Text(f"{time.strftime('%H:%M:%S')}  " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return Group(head, Text(), table_of(runs), Text(), *_events(runs))


def _events(runs: Sequence[RunStatus]) -> list[Text]:
    ended = [(attempt, run.run.name) for run in runs for attempt in History(run.run).read()]
    newest = sorted(ended, key=lambda one: one[0].ended)[-_EVENTS:]
    now = time.time()
    return [
        Text(
            f"{duration(now - attempt.ended)} ago  {name} attempt {attempt.attempt} {attempt.ending}: {attempt.reason}"
        )
        for attempt, name in newest
    ]
