"""The drill: what counts as the same run, what is not tried where, what is refused; and one, whole, on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.chaos.comparison import compare
from launcher.chaos.drill import chosen
from launcher.chaos.faults import Site, faults_at
from launcher.chaos.strike import Blow, strike
from launcher.chaos.subject import Subject, wait_until
from launcher.dev_cluster import DevCluster
from mmpretrain.cli import main
from mmpretrain.core.errors import ClusterError
from mmpretrain.core.run_files import RankProcess, write_record


def subject(run: Path, losses: Mapping[int, float], keys: list[tuple[int, list[str]]]) -> Subject:
    run.mkdir()
    rows = [{"step": step, "time": 1.0, "train/loss": loss} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"step": step, "keys": names} for step, names in keys]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return Subject(run)


KEYS = [(step, [f"k{step}"]) for step in range(1, 6)]
WHOLE = {step: 1.0 / step for step in range(1, 6)}


def test_runs_of_the_same_losses_and_samples_are_equal_as_far_as_both_went(tmp_path: Path) -> None:
    whole = subject(tmp_path / "whole", WHOLE, KEYS)
    compared = compare(subject(tmp_path / "run", {**WHOLE, 6: 0.0}, [*KEYS, (6, ["k6"])]), whole, skipped=[])
    assert compared.is_equal and (compared.losses, compared.samples) == (5, 5)
    assert str(compared).count("all equal") == 2


def test_losses_after_a_skipped_step_are_not_compared_and_samples_are(tmp_path: Path) -> None:
    whole = subject(tmp_path / "whole", WHOLE, KEYS)
    compared = compare(subject(tmp_path / "run", {**WHOLE, 4: 9.0, 5: 9.0}, KEYS), whole, skipped=[4])
    assert compared.is_equal and (compared.losses, compared.samples) == (3, 5)


def test_what_differs_is_told(tmp_path: Path) -> None:
    whole = subject(tmp_path / "whole", WHOLE, KEYS)
    keys = [*KEYS[:2], (2, ["k2"]), (4, ["k9"]), KEYS[4]]
    compared = compare(subject(tmp_path / "run", {**WHOLE, 3: 0.4}, keys), whole, skipped=[])
    assert (compared.other_losses, compared.other_samples, compared.lost, compared.twice) == ((3,), (4,), (3,), (2,))
    assert "1 DIFFER, first at step 3" in str(compared) and "1 steps lost, 1 seen twice" in str(compared)
    assert not compared.is_equal


def test_what_a_place_does_not_allow_is_not_tried_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "slurmd-n1.pid").touch()
    own = DevCluster(tmp_path)
    faults = {fault.name: fault for fault in faults_at("slurm")}
    site = Site("slurm", nodes=1)
    assert "only nodes of a cluster made by slurm/dev_cluster.sh" in faults["node-killed"].obstacle(site)
    assert "no node beside the 1 of the run" in faults["node-killed"].obstacle(Site("slurm", 1, own))
    assert "no partition was named whose jobs preempt" in faults["preemption"].obstacle(site)
    unsignalled = faults["preemption-unsignalled"].obstacle
    assert "the cluster's own settings" in unsignalled(Site("slurm", 1, urgent="high"))
    assert unsignalled(Site("slurm", 1, own, "urgent")) == ""


def test_faults_are_tried_in_the_drills_order_and_an_unknown_one_is_refused() -> None:
    assert [fault.name for fault in chosen(faults_at("local"), "nan,hang")] == ["hang", "nan"]
    with pytest.raises(ClusterError, match="there is no fault flood here; choose among rank-killed, hang, sigterm"):
        chosen(faults_at("local"), "hang,flood")


def test_a_process_that_is_no_rank_is_not_struck(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    write_record(tmp_path / "ranks" / "rank-0.json", RankProcess(0, os.getpid(), "n1", 0.0))
    with pytest.raises(ClusterError, match="rank 0 of .* does not run on"):
        strike(tmp_path, 0, Blow.KILL)


def test_waiting_ends_at_a_deadline_that_names_what_did_not_happen() -> None:
    with pytest.raises(ClusterError, match="the flood did not happen within 0 s"):
        wait_until(lambda: False, "the flood", 0.0)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "moon"], 2, "--to is 'moon'; a drill runs on local or slurm"),
        (["one.yaml", "two.yaml"], 2, "saw 2 run files (one.yaml, two.yaml); name one, or none for a tiny run"),
        (["--faults", "flood"], 4, "there is no fault flood here"),
        (["--folder", "{full}"], 4, "holds something already; remove it, or give another --folder"),
    ],
)
def test_a_drill_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit) as caught:
        main(["chaos", *(one.format(full=tmp_path / "full") for one in arguments)])
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_a_drill_on_this_machine_poisons_a_run_that_ends_as_one_left_in_peace(tmp_path: Path) -> None:
    options = ["--to", "local", "--ranks-per-node", "1", "--faults", "nan", "--folder", str(tmp_path / "c")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mmpretrain", "chaos", *options, "checkpoint.every=5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout
    assert "skipped on all ranks, its samples named in skipped.jsonl" in told
    assert told.count("all equal") == 2 and "0 steps lost, 0 seen twice by the surviving trajectory" in told
    assert "1 attempt" in told and "cancelled by its owner" in told and "next: mmpretrain submit --again" in told
