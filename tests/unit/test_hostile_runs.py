"""Run folders that others may write: their garbage stops nobody who looks at them, and what they hold is only shown."""

import json
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from guard import only_within
from hostile import DEEP, HUGE_NUMBER, exit_code
from run_reports import write as write_attempt

from data_pipeline.ledger import read_ledger
from launcher import bad_nodes
from launcher.backends.base import read_submission
from launcher.status import status_of
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError, DataError
from mmpretrain.tracking.live import LivePages, RunLine
from mmpretrain.tracking.pictures import decoded
from mmpretrain.tracking.record import read_record
from mmpretrain.tracking.wandb import run_id
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.spikes import read_rollbacks

SCRIPT = "<script>alert(1)</script>"
QUOTES = '"><img src=x onerror=alert(1)>'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten steps of one attempt, and then half a line."""
    write_attempt(tmp_path, 0, range(1, 11), 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "samp')
    return tmp_path


class Tags(HTMLParser):
    """Counts scripts, and everything that would fetch or run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.suspicious = 0, list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        for name, value in attrs:
            if name.startswith("on") or (name in ("src", "href") and not (value or "").startswith("data:")):
                self.suspicious.append(f"{tag} {name}={value}")


def test_what_a_run_says_is_shown_and_never_run(run: Path) -> None:
    row = {"step": 11, "samples": 44, "attempt": 0, "time": 1.7e9, "train/loss": 1.0, f"train/{SCRIPT}": 2.0}
    evaluation = {"step": 11, "samples": 44, "attempt": 0, "time": 1.7e9, f"val/{QUOTES}2t_r@1": 0.5, f"{SCRIPT}/x": 1}
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(one) + "\n" for one in (row, evaluation)))
    outcome = {"state": QUOTES, "step": 11, "message": SCRIPT, "reason": SCRIPT, "time": 1.7e9}
    (run / "outcome.json").write_text(json.dumps(outcome))
    (run / "ledger.jsonl").write_text(json.dumps({"reason": SCRIPT}) + "\n")
    (run / "config.yaml").write_text(f"precision: '{SCRIPT}'\nzero_stage: '{SCRIPT}'\n")
    found = [{"query": SCRIPT, "key": QUOTES, "images": [f"{SCRIPT}.jpg"], "scores": [0.5], "correct": 0}]
    (run / "evaluation").mkdir()
    (run / "evaluation" / "retrieval-samples.json").write_text(json.dumps(found))
    pictures = {SCRIPT: [{"file": "absent.png", "caption": QUOTES}]}
    (run / "evaluation" / "pictures.json").write_text(json.dumps(pictures))
    with only_within(run):
        assert exit_code("report", run) == 0
    page = Tags((run / "report.html").read_text())
    assert (page.scripts, page.suspicious) == (1, [])
    assert page.rawdata == "" and (run / "report.html").read_text().count("&lt;script&gt;") >= 6


def test_rows_that_are_none_are_counted_and_left_out(run: Path) -> None:
    sound = {"step": 11, "samples": 44, "attempt": 0, "time": 1.7e9, "train/loss": 1.0}
    changes: list[dict[str, object]] = [
        {"step": "11"},
        {"step": -1},
        {"step": 1 << 80},
        {"step": True},
        {"samples": None},
        {"time": 1e300},
        {"time": "now"},
        {"attempt": [0]},
        {"skipped": "yes"},
        {"train/loss": "low"},
        {"train/loss": [1.0]},
        {"train/loss": 10**400},
        {"n" * 201: 1.0},
    ]
    lines = [json.dumps({**sound, **change}) for change in changes]
    lines += ["[]", "null", DEEP, HUGE_NUMBER, json.dumps(sound).replace("1.0", "Infinity"), json.dumps(sound)[:-1]]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n" + json.dumps(sound) + "\n")
    record = read_record(run)
    assert (len(record.rows), record.torn) == (11, len(lines) + 1)
    assert exit_code("report", run) == 0


RECORDS: dict[str, str] = {
    "nothing": "",
    "half a line": '{"state": "comp',
    "a list": "[]",
    "a number": "7",
    "too deep": DEEP,
    "a huge number": HUGE_NUMBER,
    "other fields": '{"x": 1}',
    "other types": '{"state": ["fatal"], "step": "many", "message": {}, "reason": 1, "time": "now", "phase": 3}',
    "infinite times": '{"state": "fatal", "step": 1, "message": "", "reason": "", "time": Infinity}',
    "no numbers": '{"rank": "-1", "pid": -1, "node": null, "started": NaN, "step": NaN, "last_step": 1e999}',
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_are_none_count_as_absent(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "ranks").mkdir()
    (run / "attempts.jsonl").write_text(RECORDS[name] + "\n")
    for file in (run_files.OUTCOME, run_files.HEARTBEAT, "ranks/rank-0.json"):
        (run / file).write_text(RECORDS[name])
    with only_within(run):
        assert run_files.read_outcome(run) is None
        assert run_files.read_heartbeat(run) is None
        assert run_files.read_ranks(run) == []
        assert exit_code("status", run) == 0
    assert run.name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("history.jsonl", '{"attempt": 0}'),
        ("history.jsonl", DEEP),
        ("history.jsonl", json.dumps({"attempt": 0, "began": 1e60, "nodes": [], "job": "1", "from_step": 0})),
        ("launch/attempt.json", "garbage"),
        ("launch/submitted.json", '{"backend": "slurm", "job": "--user=root", "time": 1.0}'),
        ("launch/submitted.json", '{"backend": "local", "job": "-1", "time": 1.0}'),
        ("launch/submitted.json", "[1]"),
    ],
)
def test_a_run_whose_history_cannot_be_read_hides_no_other(
    file: str, content: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "attempts.jsonl").write_text("{}\n")
    (run / "launch").mkdir()
    (run / file).write_text(content)
    with only_within(run):
        assert exit_code("status", run) == 0
        assert exit_code("cancel" if "submitted" in file else "why", run) == 4
    shown = capsys.readouterr()
    assert "unreadable" in shown.out and shown.err.startswith(f"error: {run / file}")
    assert status_of(run).state == "unreadable"


def test_a_job_of_the_run_folder_is_no_option_of_the_scheduler(run: Path) -> None:
    (run / "launch").mkdir()
    (run / "launch" / "submitted.json").write_text('{"backend": "slurm", "job": "12_3", "time": 1.0}')
    assert read_submission(run) is not None
    (run / "launch" / "submitted.json").write_text('{"backend": "slurm", "job": "1 --user=root", "time": 1.0}')
    with pytest.raises(ClusterError, match="names the job '1 --user=root', which is no number"):
        read_submission(run)


def test_a_node_of_the_list_is_no_line_of_a_script(tmp_path: Path) -> None:
    bad_nodes.remember(tmp_path, ["n1\ntouch owned"], "slow")
    with pytest.raises(ClusterError, match="which is no name of one; remove the line"):
        bad_nodes.known(tmp_path)
    (tmp_path / bad_nodes.FILE).write_text("[]\n")
    with pytest.raises(ClusterError, match="bad-nodes.jsonl:1 is no line of a launcher"):
        bad_nodes.known(tmp_path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkfifo, None),
        (Path.mkdir, None),
        (lambda path: path.symlink_to("/dev/zero"), None),
        (lambda path: path.write_bytes(b"\xff\xfe stop"), "�� stop"),
        (lambda path: path.write_bytes(b"s" * (1 << 20)), "s" * 4096),
    ],
)
def test_whatever_is_put_in_place_of_a_request_neither_blocks_nor_breaks_the_run(
    make: Callable[[Path], object], text: str | None, tmp_path: Path
) -> None:
    (tmp_path / "control").mkdir()
    make(tmp_path / "control" / "stop")
    assert RunFolder(tmp_path).take_control("stop") == text
    for number in ("²", "-1", "9" * 200, "x"):
        (tmp_path / "control" / f"profile:{number}").touch()
        assert RunFolder(tmp_path).take_numbered_control("profile") in (0, int("9" * 200))


REPORTED: dict[str, tuple[str, str, str]] = {
    "a config of a billion laughs": ("config.yaml", "a0: &a0 [x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    ), "aliases unfold"),
    "a config that is none": ("config.yaml", "{", "is not YAML"),
    "an outcome that is none": ("outcome.json", "{", "is no JSON"),
    "retrieved of no list": ("evaluation/retrieval-samples.json", "7", "is no list of what was retrieved"),
    "retrieved of no scores": (
        "evaluation/retrieval-samples.json",
        '[{"query": "", "key": "", "images": [], "scores": ["high"], "correct": 0}]',
        "is no list of what was retrieved",
    ),
    "retrieved from elsewhere": (
        "evaluation/retrieval-samples.json",
        '[{"query": "", "key": "", "images": ["../../x.png"], "scores": [1], "correct": 0}]',
        "outside its folder",
    ),
    "pictures that are none": ("evaluation/pictures.json", '{"a": [{}]}', "is no list of pictures"),
    "pictures too deep": ("evaluation/pictures.json", DEEP, "is no list of pictures"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_a_report_of_garbage_says_what_is_garbage(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = REPORTED[name]
    (run / "evaluation").mkdir()
    (run / file).write_text(content)
    with only_within(run):
        assert exit_code("report", run) == 3
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error
    pages = LivePages(lambda: [RunLine(run, run.name, "crashed", ("",) * 7)])
    assert run.name in (pages.get(str(run)) or "") and run.name in (pages.get("/") or "")


def test_a_picture_of_a_run_is_only_ever_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with only_within(tmp_path), pytest.raises(DataError, match="a.png cannot be shown: .* of no known format"):
        decoded(tmp_path / "a.png")


def test_an_id_that_would_be_a_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("../../elsewhere\n")
    with pytest.raises(DataError, match="which is no id of a W&B run; remove the file for a new one"):
        run_id(tmp_path)


def test_a_replay_refuses_settings_that_are_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text("tracking: {trackers: [{kind: wandb, mode: !!python/name:os.system x}]}\n")
    assert exit_code("wandb", "sync", run, "--offline") == 3
    assert "the tag 'tag:yaml.org,2002:python/name:os.system' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["{", "[1]", DEEP, '{"step": "one", "position": []}'])
def test_a_row_that_is_none_is_named_before_a_run_goes_on(row: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(f"{row}\nhalf a li")
    with pytest.raises(DataError, match="a row|no row"):
        RunFolder(tmp_path).rewind(3, 12)
    with pytest.raises(DataError, match="ledger.jsonl(:1 is no row| holds a row that is no skip)"):
        read_ledger(tmp_path / "ledger.jsonl")
    (tmp_path / "checkpoints.jsonl").write_text(f'{{"event": "valid", "step": 3}}\n{row}\n')
    (tmp_path / "rollbacks.jsonl").write_text(f"{row}\n")
    with pytest.raises(DataError, match="rollbacks.jsonl"):
        read_rollbacks(tmp_path)


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-evil", "step-", "step-²", "step--1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in run_files.saved_checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]
    assert run_files.last_saved_step(tmp_path) == 2
    assert run_files.saved_checkpoints(tmp_path / "absent") == []
