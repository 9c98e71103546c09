"""The page of live runs, asked over HTTP as a browser would."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmpretrain.core.errors import ClusterError
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.jsonl import JsonlTracker
from mmpretrain.tracking.live import RunLine, serve


def train(run: Path, steps: range) -> None:
    run.mkdir(exist_ok=True)
    tracker = JsonlTracker(run / "metrics.jsonl", attempt=0)
    for step in steps:
        tracker.log(StepReport(step, 4 * step, {"train/loss": 1.0 / step, "perf/step_s": 0.1}))
    tracker.close("crashed")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    figures = ("3/30", "40", "0.33", "1:00", "1", "node1", "")
    runs = [RunLine(tmp_path / name, name, "running", figures) for name in ("first run", "second")]
    server = serve(lambda: runs, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def get(address: str) -> str:
    with urllib.request.urlopen(address.replace(" ", "%20"), timeout=10) as answer:
        return answer.read().decode()


def test_the_list_names_every_run_with_its_figures(site: str, tmp_path: Path) -> None:
    text = get(site)
    assert text.count("<tr>") == 3
    assert f'<a href="{tmp_path}/first run">first run</a>' in text and "<td>3/30</td>" in text
    assert "fetch(location.href)" in text


def test_the_page_of_a_run_tells_new_steps_and_one_without_steps_says_so(site: str, tmp_path: Path) -> None:
    run = tmp_path / "second"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert "has no finished step to report" in get(f"{site}{run}")
    train(run, range(1, 4))
    assert "3 of 3 steps" in get(f"{site}{run}")
    train(run, range(4, 8))
    assert "7 of 7 steps" in get(f"{site}{run}")


def test_no_page_shows_what_is_no_run_of_the_list(site: str, tmp_path: Path) -> None:
    train(tmp_path / "other", range(1, 3))
    for path in (f"{tmp_path}/other", f"{tmp_path}/second/../other", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{site}{path}")


def test_a_taken_port_is_refused(site: str) -> None:
    port = int(site.rpartition(":")[2])
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port} is taken; give another --port, or --port 0"):
        serve(list, "127.0.0.1", port)
