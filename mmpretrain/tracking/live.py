"""Runs on a page that renews itself, for those with no account anywhere: a list, and for each run its whole report.

Enter: whatever lists the runs, and an address to listen on. Leave: pages, drawn from the run folders whenever they
changed; nothing is written and nothing outside the page is asked for. Refused: an address that is taken.
"""

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmpretrain.core.errors import ClusterError, MMPretrainError
from mmpretrain.tracking.report import compose, page
from mmpretrain.tracking.report_facts import read_story
from mmpretrain.tracking.report_style import LIVE_SCRIPT

RENEW_S = 5
"""Seconds between two looks of a page at its run."""


@dataclass(frozen=True)
class RunLine:
    """A run as the list shows it."""

    run: Path
    name: str
    state: str
    figures: tuple[str, ...]
    """One text for each of `HEADINGS`."""


HEADINGS = ("step", "samples/s", "loss", "left", "attempts", "nodes", "detail")


class LivePages:
    """Draws pages, each anew only when its run has written something."""

    def __init__(self, runs: Callable[[], Sequence[RunLine]]) -> None:
        self._runs = runs
        self._drawn: dict[Path, tuple[float, str]] = {}

    def get(self, path: str) -> str | None:
        """The page at a path; None where there is none."""
        lines = {self._name(line): line for line in self._runs()}
        name = unquote(urlsplit(path).path).strip("/")
        if not name:
            return page("runs", _list(lines), LIVE_SCRIPT)
        return self._report(lines[name].run) if name in lines else None

    def _name(self, line: RunLine) -> str:
        return str(line.run).strip("/")

    def _report(self, run: Path) -> str:
        changed = max((file.stat().st_mtime for file in run.glob("*.json*")), default=0.0)
        known, drawn = self._drawn.get(run, (-1.0, ""))
        if changed != known:
            drawn = _drawn(run)
            self._drawn[run] = (changed, drawn)
        return drawn


def _drawn(run: Path) -> str:
    try:
        return compose(read_story(run), LIVE_SCRIPT)
    except MMPretrainError as nothing_yet:
        return page(
            run.name, f'<h1>{escape(run.name)}</h1><p class="empty">{escape(str(nothing_yet))}</p>', LIVE_SCRIPT
        )


def _list(lines: dict[str, RunLine]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = "".join(_row(name, line) for name, line in lines.items())
    return (
        '<header><p class="over">mmpretrain</p><h1>Runs</h1></header><div class="card scroll"><table><thead><tr>'
        f'<th class="left">run</th><th class="left">state</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"<footer>Seen {time.strftime('%H:%M:%S UTC', time.gmtime())}; renews itself every {RENEW_S} s.</footer>"
    )


def _row(name: str, line: RunLine) -> str:
    cells = "".join(f"<td>{escape(figure)}</td>" for figure in line.figures)
    return (
        f'<tr><td class="left"><a href="/{escape(name)}">{escape(line.name)}</a></td><td class="left">'
        f'<span class="state {escape(line.state)}">{escape(line.state)}</span></td>{cells}</tr>'
    )


def serve(runs: Callable[[], Sequence[RunLine]], host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`; port 0 takes any that is free."""
    pages = LivePages(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = pages.get(self.path)
            content = (found or "There is no such run.").encode()
            self.send_response(HTTPStatus.OK if found is not None else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are no news."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as fault:
        reason = "is taken" if fault.errno == errno.EADDRINUSE else f"cannot be used ({fault.strerror})"
        raise ClusterError(f"{host}:{port} {reason}; give another --port, or --port 0 for any that is free") from fault
