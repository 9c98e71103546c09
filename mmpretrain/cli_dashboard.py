"""`mmpretrain dashboard`: every run under some folders on a local page, with no account anywhere.

Enter: folders and a port. Leave: a server until Ctrl-C. Refuses folders without runs and a port that is taken.
"""

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    roots: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER", help="Runs, or folders that hold them.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8090,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 shows the runs to the whole network.")] = (
        "127.0.0.1"
    ),
) -> None:
    """Serve a live page of all runs, each with its report, until Ctrl-C."""
    from launcher.status import find_runs, status_of
    from mmpretrain.tracking.live import RunLine, serve

    folders = [root.absolute() for root in roots or [Path("runs")]]
    find_runs(folders)

    def lines() -> list[RunLine]:
        runs = [status_of(run, folders) for run in find_runs(folders)]
        return [RunLine(one.run, one.name, one.state, one.cells[2:]) for one in runs]

    with serve(lines, host, port) as server:
        typer.echo(f"http://{host}:{server.server_port}/  (Ctrl-C ends it)")
        server.serve_forever()
