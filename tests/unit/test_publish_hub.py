"""Uploading a published folder, against a hub of a few lines on this machine."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mmpretrain.publishing.facts import PublishError
from mmpretrain.publishing.folder import write_sums
from mmpretrain.publishing.hub import upload

TOKEN = "write-token"


class FakeHub(ThreadingHTTPServer):
    """Takes repositories and commits whose files are all inline."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubRequest)
        self.files: dict[str, bytes] = {}
        self.created: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class FakeHubRequest(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body)["name"])
            self._answer(200, {"url": f"{self.server.address}/someone/shapes"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer(200, {"files": [{"path": name, **plain} for name in names]})
        elif "/commit/" in self.path:
            records = [json.loads(line) for line in body.splitlines()]
            files = [record["value"] for record in records if record["key"] == "file"]
            self.server.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._answer(200, {"commitUrl": f"{self.server.address}/someone/shapes/commit/1", "commitOid": "1"})
        else:
            self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"siblings": [], "id": "someone/shapes", "sha": "0"})

    def _answer(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clip").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# shapes\n")
    (tmp_path / "clip" / "model.safetensors").write_bytes(bytes(range(256)))
    write_sums(tmp_path)
    return tmp_path


def test_every_file_arrives_with_its_bytes(hub: FakeHub, folder: Path) -> None:
    address = upload(folder, "someone/shapes", env={"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.address})
    assert address == f"{hub.address}/someone/shapes/commit/1"
    assert hub.created == ["shapes"]
    assert set(hub.files) == {"README.md", "SHA256SUMS", "clip/model.safetensors"}
    assert all((folder / name).read_bytes() == content for name, content in hub.files.items())


def test_a_refused_token_is_told_with_what_to_do(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(PublishError, match=r"the hub did not take someone/shapes: .*can be uploaded again"):
        upload(folder, "someone/shapes", env={"HF_TOKEN": "other", "HF_ENDPOINT": hub.address})
    assert hub.files == {}


def test_a_missing_token_is_told_before_anything_is_sent(folder: Path) -> None:
    with pytest.raises(PublishError, match="no HF_TOKEN in the environment; set it to a write token"):
        upload(folder, "someone/shapes", env={})


def test_a_changed_folder_is_not_uploaded(hub: FakeHub, folder: Path) -> None:
    (folder / "README.md").write_text("changed")
    with pytest.raises(PublishError, match=r"\['README.md'\] differ from SHA256SUMS"):
        upload(folder, "someone/shapes", env={"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.address})
    assert hub.created == []
