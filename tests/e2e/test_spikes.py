"""A loss spike at the command line: told, or answered by going back past the data that led to it."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from command_line import Project, rows_of

from mmpretrain.core.errors import ConfigError
from mmpretrain.tracking.base import RunFacts
from mmpretrain.tracking.webhook import WebhookConfig
from mmpretrain.training.spikes import FEWEST, SpikeMeter


def test_the_score_is_the_distance_from_the_window_in_its_deviations() -> None:
    draw = np.random.default_rng(0)
    losses, norms = draw.normal(3.0, 0.1, 200), draw.normal(1.0, 0.2, 200)
    meter = SpikeMeter(window=64)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        before = [figures[max(0, step - 64) : max(1, step)] for figures in (losses, norms)]
        expected = max(0.0, *((x - b.mean()) / (b.std() or 1) for x, b in zip((loss, norm), before, strict=True)))
        score = meter.score({"train/loss": loss, "train/grad_norm": norm})
        assert score == pytest.approx(expected if step >= FEWEST else 0.0)
    assert meter.score({"train/loss": 4.0, "train/grad_norm": 1.0}) > 6
    assert meter.score({"train/loss": float("nan"), "train/grad_norm": 1.0}) < 6


SPIKY = ("steps=60", "checkpoint.every=10", "trace_samples=true", "spikes.window=32")


def test_a_run_goes_back_past_a_spike_and_reads_the_data_after_it(project: Project) -> None:
    """Noise alone exceeds one sigma soon; the data order of a run without spikes tells what must be read."""
    plain = Project(project.folder / "plain", project.warm)
    plain.folder.mkdir()
    plain.config.write_text(project.config.read_text().replace("/output", "/plain/output"))
    assert plain.train(*SPIKY, "steps=90").code == 0
    order = [row["keys"] for row in plain.rows("samples.jsonl")]

    ended = project.train(*SPIKY, "spikes.sigmas=1.0", "spikes.action=roll_back", "spikes.max_rollbacks=1")
    (first, *_) = project.rows("rollbacks.jsonl")
    back, spike = first["to_step"], first["from_step"]
    assert isinstance(back, int) and isinstance(spike, int) and spike > FEWEST and back == (spike - 1) // 10 * 10
    keys = {row["step"]: row["keys"] for row in project.rows("samples.jsonl")}
    for step in keys:
        assert keys[step] == order[step - 1 if step <= back else step - 1 + spike - back], step
    assert f"back to step {back}, past the data of {spike - back} steps" in ended.stdout
    if ended.code:  # it spiked again, which this config does not allow
        assert "the run went back 1 times already (spikes.max_rollbacks=1); lower optimizer.lr" in ended.stderr
        assert project.outcome()[0] == "fatal"
    _assert_the_gap_goes_with_the_checkpoint(project, order, back, spike)


def _assert_the_gap_goes_with_the_checkpoint(project: Project, order: list[object], back: int, spike: int) -> None:
    """A checkpoint that is moved to another folder alone still knows what data the run left out."""
    assert project.train(*SPIKY, "steps=70").code == 0
    elsewhere = project.folder / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    newest = project.checkpoints[-1]
    shutil.copytree(newest, elsewhere / "checkpoints" / newest.name)
    assert project.train(*SPIKY, "steps=76", f"output={elsewhere}").code == 0
    assert (elsewhere / "rollbacks.jsonl").read_text() == (project.output / "rollbacks.jsonl").read_text()
    keys = {row["step"]: row["keys"] for row in rows_of(elsewhere / "samples.jsonl")}
    assert keys == {step: order[step - 1 + spike - back] for step in range(71, 77)}


def test_an_alert_reaches_a_server_and_names_the_figures(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """No line for each request."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MMPRETRAIN_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/")
    facts = RunFacts(project.folder, "tiny", "trials", 0, 30, 0, 4, {})
    tracker = WebhookConfig().build(facts)
    tracker.alert("loss spike", "step 7 stands 9.0 sigma above the steps before it")
    tracker.close("fatal")
    server.shutdown()
    assert received == [
        "tiny: loss spike: step 7 stands 9.0 sigma above the steps before it",
        "tiny: fatal after step 0 of 30",
    ]


def test_a_webhook_without_an_address_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMPRETRAIN_WEBHOOK_URL", raising=False)
    with pytest.raises(ConfigError, match="no http.s. address in the environment variable MMPRETRAIN_WEBHOOK_URL"):
        WebhookConfig().build(RunFacts(project.folder, "tiny", "trials", 0, 30, 0, 4, {}))
    ended = project.train("tracking.trackers=[{kind: webhook}]")
    assert ended.code == 2 and "set it where the run starts, or remove the tracker" in ended.stderr
