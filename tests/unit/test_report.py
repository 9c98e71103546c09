"""The report page of runs of every kind: whole, resumed, young, empty, damaged."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpretrain.core.errors import DataError
from mmpretrain.core.types import StepReport
from mmpretrain.tracking.jsonl import JsonlTracker
from mmpretrain.tracking.report import write_report

STEPS, BATCH, RESUMED_AT, KILLED_AT, SKIPPED = 600, 128, 400, 430, 212
QUERIES = ("A red circle <on the left> & a blue square", "Two dogs run on the beach .")


def step_report(step: int, draw: np.random.Generator) -> StepReport:
    """A step as a short contrastive + MLM + MIM run on one small machine has it."""
    itc = 4.85 * math.exp(-step / 170) + 0.35 + draw.normal(0, 0.09)
    mlm = 5.2 * math.exp(-step / 240) + 1.9 + draw.normal(0, 0.12)
    mim = 0.45 * math.exp(-step / 60) + 0.31 + draw.normal(0, 0.006)
    slow = step % 97 == 0
    rate = 410 + draw.normal(0, 9) - 120 * slow
    skipped = step == SKIPPED
    return StepReport(
        step=step,
        samples=step * BATCH,
        metrics={
            "train/loss": math.nan if skipped else itc + mlm + mim,
            "train/loss_itc": math.nan if skipped else itc,
            "train/loss_mlm": mlm,
            "train/loss_mim": mim,
            "train/lr": 1e-3 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * max(0, step - 100) / 500)),
            "train/grad_norm": math.inf if skipped else 6 * math.exp(-step / 150) + 0.6 + abs(draw.normal(0, 0.3)),
            "train/skipped_steps": float(skipped),
            "train/logit_scale": 14.3 + 9 * (1 - math.exp(-step / 300)),
            "embed/pos_sim": 0.75 - 0.5 * math.exp(-step / 150) + draw.normal(0, 0.01),
            "embed/neg_sim": 0.05 + 0.2 * math.exp(-step / 80) + draw.normal(0, 0.01),
            "embed/modality_gap": 0.9 - 0.3 * (1 - math.exp(-step / 200)),
            "perf/step_s": BATCH / rate,
            "perf/samples_per_s": rate,
            "perf/samples_per_s_per_gpu": rate / 2,
            "perf/data_s": 0.006 + 0.09 * slow,
            "perf/data_pct": 100 * (0.006 + 0.09 * slow) * rate / BATCH,
            "mem/host_rss_gib": 1.9 + 0.1 * math.tanh(step / 40),
        },
        skipped=skipped,
    )


def evaluation(step: int) -> dict[str, float]:
    top = 0.82 * (1 - math.exp(-step / 260))
    recalls = {f"{way}_r@{k}": min(1.0, (top + lift) ** (1 / k**0.5)) for k in (1, 5, 10) for way, lift in WAYS}
    chance = {f"{way}_chance_r@{k}": k / 1000 for k in (1, 5, 10) for way, _ in WAYS}
    ranks = {f"{way}_mean_rank": 1 + 500 * math.exp(-step / 120) for way, _ in WAYS}
    words = {"mlm_acc": top * 0.7, "mlm_acc_shuffled": top * 0.5, "mlm_acc_guess": 0.071}
    return {f"val/{name}": value for name, value in (recalls | chance | ranks | words).items()}


WAYS = (("i2t", 0.0), ("t2i", -0.01))


def pretend_run(run_dir: Path, pictures: list[bytes], steps: int = STEPS) -> Path:
    """A run that was killed at step 430, resumed from step 400, skipped one step and replaced three samples."""
    (run_dir / "evaluation" / "thumbnails").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for attempt, first, last in ((0, 1, KILLED_AT), (1, RESUMED_AT + 1, steps)):
        tracker = JsonlTracker(run_dir / "metrics.jsonl", attempt)
        for step in range(first, last + 1):
            tracker.log(step_report(step, draw))
            if step % 50 == 0:
                tracker.log_evaluation(step, step * BATCH, evaluation(step))
        tracker.close("completed")
        if attempt == 0:
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 431, "samp')
    _spread_in_time(run_dir)
    reasons = ["cannot decode image: broken JPEG", "cannot decode image: broken JPEG", "no caption <empty> text"]
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps({"key": "k", "reason": r}) + "\n" for r in reasons))
    (run_dir / "config.yaml").write_text(f"output: {run_dir.name}\nsteps: {steps}\nprecision: bf16\nzero_stage: 2\n")
    (run_dir / "outcome.json").write_text(json.dumps({"state": "completed", "step": steps, "message": "done"}))
    _write_retrieved(run_dir / "evaluation", pictures)
    return run_dir


def _spread_in_time(run_dir: Path) -> None:
    """Give the rows the times of a real run: steps of 0.3 s, ninety seconds between the attempts."""
    clock, lines, starts = 1.79e9, [], {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        if line.endswith("}"):
            row = json.loads(line)
            clock += 90.0 if row["attempt"] not in starts and starts else 0.0
            starts.setdefault(row["attempt"], clock - 8.0)
            clock += row.get("perf/step_s", 1.5)
            line = json.dumps({**row, "time": clock})
        lines.append(line + "\n")
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    begun = [{"attempt": attempt, "time": start, "ranks": 2} for attempt, start in starts.items()]
    (run_dir / "attempts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in begun))


def _write_retrieved(folder: Path, pictures: list[bytes]) -> None:
    for index, picture in enumerate(pictures):
        (folder / "thumbnails" / f"{index:08d}.jpg").write_bytes(picture)
    samples = [
        {
            "query": query,
            "key": f"shard-0/{number}",
            "images": [f"thumbnails/{(number + place) % len(pictures):08d}.jpg" for place in range(5)],
            "correct": (0, None)[number],
            "scores": [0.61, 0.58, 0.41, 0.4, 0.37],
        }
        for number, query in enumerate(QUERIES)
    ]
    (folder / "retrieval-samples.json").write_text(json.dumps(samples))


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; refuses elements that are not closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Five small JPEGs, each of another grey."""
    shades = []
    for shade in range(0, 250, 50):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 12), (shade, shade, shade)).save(buffer, "JPEG")
        shades.append(buffer.getvalue())
    return shades


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, pictures: list[bytes]) -> Path:
    return pretend_run(tmp_path_factory.mktemp("runs") / "flickr1k", pictures)


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_the_page_asks_no_server_for_anything(page: Page) -> None:
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not any(tag in ("link", "iframe", "object") for tag, _, _ in page.attributes)


def test_the_page_names_the_run_its_state_and_its_size(page: Page) -> None:
    assert "flickr1k completed" in page.text
    assert "600 of 600 steps" in page.text
    assert "76,800 samples" in page.text
    assert "ZeRO-2" in page.text


def test_every_objective_has_a_curve_with_the_last_value_of_its_smoothed_loss(page: Page) -> None:
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels[:4] == ["Total loss", "itc", "mlm", "mim"]
    assert {"image → text", "text → image", "Logit scale", "Samples per second", "embed/modality_gap"} <= set(labels)


def test_the_read_out_of_a_chart_holds_the_logged_losses_of_the_attempt_that_stands(page: Page, run_dir: Path) -> None:
    plots = [json.loads(value) for _, name, value in page.attributes if name == "data-plot"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    newest = {row["step"]: row["train/loss_mlm"] for row in rows if "train/loss" in row}
    means = [(newest[step] + newest[step + 1]) / 2 for step in range(1, STEPS, 2)]
    assert plots[2]["series"][0]["y"] == pytest.approx(means, rel=1e-3)


def test_tiles_tell_the_end_of_a_short_run_and_no_start_of_its_workers(tmp_path: Path) -> None:
    """Of 30 steps the last three, and waits of all but the first, in which workers start for 9 of its 10 seconds."""
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 31):
        first = step == 1
        times = {"perf/step_s": 10.0 if first else 1.0, "perf/data_s": 9.0 if first else 0.02}
        tracker.log(StepReport(step, step, {"train/loss": 40.0 - step} | times))
    tracker.close("completed")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Loss 11.0 over 3 steps, from 39.0" in text
    assert "Waiting for data 2.0% of step time, first steps aside" in text


def test_skipped_steps_and_resumptions_are_marked_on_every_chart(page: Page) -> None:
    kinds = [value for tag, name, value in page.attributes if tag == "path" and name == "class"]
    plots = [name for _, name, _ in page.attributes].count("data-plot")
    assert kinds.count("skipped") == kinds.count("resumed") == plots
    assert f"1 step skipped because a loss or gradient was not finite: {SKIPPED}." in page.text


def test_attempts_tell_how_many_steps_were_lost(page: Page) -> None:
    assert re.search(rf"1 to {KILLED_AT} {KILLED_AT - RESUMED_AT} 1 ", page.text)
    assert f"{RESUMED_AT + 1} to {STEPS}" in page.text
    assert "1 line of metrics.jsonl cut short" in page.text


def test_evaluation_stands_beside_chance_and_best(page: Page) -> None:
    last = evaluation(STEPS)["val/i2t_r@1"]
    assert f"val/i2t_r@1 {last:.3f} {last:.3f} at 600 0.00100" in page.text
    assert "val/mlm_acc_shuffled" in page.text
    assert "val/mlm_acc_guess" not in page.text


def test_retrieved_pictures_are_embedded_and_captions_escaped(page: Page, pictures: list[bytes]) -> None:
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources[:5]] == pictures
    assert f"“{QUERIES[0]}” right image at place 1" in page.text
    assert f"“{QUERIES[1]}” not among them" in page.text


def test_replaced_samples_are_counted_by_reason(page: Page) -> None:
    assert "cannot decode image: broken JPEG 2 no caption <empty> text 1" in page.text


def test_a_run_of_one_step_without_any_other_file_has_a_page(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", attempt=0)
    tracker.log(StepReport(step=1, samples=8, metrics={"train/loss": 2.5}))
    tracker.close("crashed")
    text = Page(write_report(tmp_path, tmp_path / "shown" / "page.html").read_text(encoding="utf-8")).text
    assert "running" in text
    assert "Total loss loss 2.50" in text


def test_a_run_whose_every_loss_is_not_finite_has_a_page(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", attempt=0)
    for step in (1, 2):
        tracker.log(StepReport(step, 8 * step, {"train/loss": math.nan, "train/lr": 0.0}, skipped=True))
    tracker.close("fatal")
    (tmp_path / "outcome.json").write_text('{"state": "fatal", "message": "2 steps in a row", "step": 2}')
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "fatal" in text
    assert "2 steps in a row" in text
    assert "Total loss" not in text


def test_a_long_silent_run_without_outcome_counts_as_crashed(tmp_path: Path, pictures: list[bytes]) -> None:
    run_dir = pretend_run(tmp_path / "dead", pictures, steps=450)
    (run_dir / "outcome.json").unlink()
    assert "dead crashed" in Page(write_report(run_dir).read_text(encoding="utf-8")).text


def test_a_missing_picture_leaves_a_blank(tmp_path: Path, pictures: list[bytes]) -> None:
    run_dir = pretend_run(tmp_path / "run", pictures, steps=450)
    (run_dir / "evaluation" / "thumbnails" / "00000003.jpg").unlink()
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert ("span", "title", "00000003.jpg is missing") in page.attributes


def test_a_picture_outside_the_evaluation_folder_is_refused(tmp_path: Path, pictures: list[bytes]) -> None:
    run_dir = pretend_run(tmp_path / "run", pictures, steps=450)
    sample = {"query": "q", "key": "k", "images": ["../../secret.png"], "correct": 0, "scores": [0.5]}
    (run_dir / "evaluation" / "retrieval-samples.json").write_text(json.dumps([sample]))
    with pytest.raises(DataError, match=r"names '../../secret.png', outside its folder; evaluate the run again"):
        write_report(run_dir)


def test_folders_without_steps_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder; name the `output` of a run"):
        write_report(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has no metrics.jsonl; name the folder of a run that has finished a step"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "sam')
    with pytest.raises(DataError, match=r"no finished step to report: .* 0 rows of evaluations and 1 broken lines"):
        write_report(tmp_path)


def test_a_broken_outcome_file_is_named(tmp_path: Path, pictures: list[bytes]) -> None:
    run_dir = pretend_run(tmp_path / "run", pictures, steps=450)
    (run_dir / "outcome.json").write_text("{")
    with pytest.raises(DataError, match=r"outcome.json is no JSON .*; remove it and report again"):
        write_report(run_dir)


def test_a_page_that_cannot_be_written_is_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match="cannot be written .*; name another place for the report"):
        write_report(run_dir, Path("/dev/null/report.html"))
