"""The progress bar of long commands, on stderr, and only where a person watches."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar() -> Progress:
    """A bar with count, time gone and time left; it shows nothing where stderr is no terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal  # it would end with an empty line there
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
