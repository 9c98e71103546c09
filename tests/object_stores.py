"""Servers on loopback that shards are read from: HTTP with ranges and faults, and S3 by moto."""

import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from s3fs import S3FileSystem

BUCKET = "shards"


@dataclass
class Faults:
    """How often, from 0 to 1, answers go wrong, and what was answered."""

    drop: float = 0.0
    """The connection ends in the middle of the body."""
    corrupt: float = 0.0
    """One bit of the body is another."""
    refuse: float = 0.0
    """503."""
    ignore_ranges: bool = False
    only: str = ""
    """Names these faults happen to; all where it is empty."""
    seed: int = 7
    answers: Counter[str] = field(default_factory=Counter)
    """Number of answers with each outcome, and of each name under "GET name"."""
    bytes_sent: int = 0

    def __post_init__(self) -> None:
        self._draw, self._lock = random.Random(self.seed), threading.Lock()

    def choose(self, name: str) -> str:
        with self._lock:
            draw = self._draw.random()
            chosen = "served"
            if name.endswith(self.only):
                for fault in ("drop", "corrupt", "refuse"):
                    share = getattr(self, fault)
                    if 0 <= draw < share:
                        chosen = fault
                    draw -= share
            self.answers[chosen] += 1
            self.answers[f"GET {name}"] += 1
            return chosen


@contextmanager
def http_server(folder: Path, faults: Faults) -> Iterator[str]:
    """Serves a folder; its listings are pages of links."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silent."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = folder / self.path.lstrip("/")
            outcome = faults.choose(path.name)
            if outcome == "refuse" or not path.exists():
                self._send(503 if outcome == "refuse" else 404, b"")
                return
            content, kind = (
                (path.read_bytes(), "application/x-tar") if path.is_file() else (_listing(path), "text/html")
            )
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted and not faults.ignore_ranges:
                content = content[int(wanted[1]) : int(wanted[2]) + 1]
            if with_body and outcome == "corrupt" and content:
                place = len(content) * 2 // 3
                content = content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :]
            self._send(206 if wanted else 200, content, kind, with_body, cut=outcome == "drop")

        def _send(
            self, status: int, content: bytes, kind: str = "text/plain", with_body: bool = True, cut: bool = False
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", kind)
            self.end_headers()
            if with_body:
                sent = content[: len(content) // 2] if cut else content
                faults.bytes_sent += len(sent)
                self.wfile.write(sent)
            if cut:
                self.close_connection = True
                self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _listing(folder: Path) -> bytes:
    return "".join(f'<a href="{path.name}">{path.name}</a>\n' for path in sorted(folder.iterdir())).encode()


@contextmanager
def s3_server(port: int) -> Iterator[dict[str, str]]:
    """moto's S3 in a process of its own; the environment by which clients find it."""
    S3FileSystem.clear_instance_cache()  # clients of a server before would go on asking that one
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(environment["AWS_ENDPOINT_URL"], server)
            yield environment
        finally:
            server.terminate()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.URLError:
            assert server.poll() is None and time.monotonic() < deadline, "moto did not start"
            time.sleep(0.05)
