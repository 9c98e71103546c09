"""Submitting, as far as no job has to run for it: refusals leave nothing behind, and a snapshot holds what will run."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.make import make
from launcher import snapshot
from launcher.backends.base import backend_named, record_submission, standing
from launcher.cancelling import cancel_run
from launcher.chaos.subject import wait_until
from launcher.render import variables
from launcher.spec import JobSpec, read_spec
from mmpretrain.cli_submit import Wishes, dry_run, plan_jobs, submit
from mmpretrain.config import configs_folder
from mmpretrain.core.config import dump_yaml
from mmpretrain.core.errors import ClusterError, ConfigError, DataError
from mmpretrain.planning.plan import state_estimate

LOCAL = Wishes("local")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    make(folder, samples=64, image_size=24, samples_per_shard=64, workers=1)
    return folder / "train"


def overrides(folder: Path, shards: Path, *more: str) -> list[str]:
    return [f"output={folder}/runs/one", f"data.train.sources.main.shards=[{shards}]", *more]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk with no more room than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_nothing_is_made_and_the_way_out_is_named(tmp_path: Path, shards: Path) -> None:
    wishes = Wishes("slurm")
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), wishes)
    with pytest.raises(ClusterError, match="there is no sbatch on this machine; submit from a login node.*--to local"):
        submit(jobs, wishes)
    assert not (tmp_path / "runs").exists()


def test_shards_that_are_not_there_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, Path("/nowhere")), LOCAL)
    with pytest.raises(DataError, match="'/nowhere': nothing there"):
        submit(jobs, LOCAL)
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_way_of_the_run_folder_is_named(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "runs").write_text("")
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    with pytest.raises(
        ClusterError, match="the run folder .*/runs/one cannot be written .*; free space or quota there"
    ):
        submit(jobs, LOCAL)
    assert (tmp_path / "runs").read_text() == ""


def test_a_full_disk_leaves_no_half_made_run(tmp_path: Path, shards: Path) -> None:
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    with largest_file(2000), pytest.raises(ClusterError, match="cannot be written"):
        submit(jobs, LOCAL)
    assert not (tmp_path / "runs").exists()


def test_several_nodes_on_one_machine_are_refused(tmp_path: Path, shards: Path) -> None:
    wishes = Wishes("local", nodes=2)
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), wishes)
    with pytest.raises(ClusterError, match="--to local has one node, saw --nodes 2"):
        submit(jobs, wishes)
    assert not (tmp_path / "runs").exists()


def test_states_larger_than_a_gpu_are_refused(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "site.yaml").write_text("gpu_memory_gib: 0.001\n")
    wishes = Wishes("local", cluster=tmp_path / "site.yaml")
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), wishes)
    with pytest.raises(ClusterError, match="more than the 0.001 GiB of a GPU, before any activation"):
        submit(jobs, wishes)
    assert not (tmp_path / "runs").exists()


def test_memory_of_states_follows_the_zero_stage() -> None:
    """Of 8 ranks: sixteen bytes a parameter at stage 0; above it masters of 4 bytes more, which ranks divide like
    moments and gradients, and at last weights, all of which are gathered for use; a buffer of 2 GB for gradients."""
    (job,) = plan_jobs(configs_folder() / "clip-vit-l14.yaml", [], LOCAL)
    expected = {0: (16, 0), 1: (4 + 16 / 8, 2e9), 2: (4 + 16 / 8, 2e9), 3: (20 / 8 + 4, 2e9)}
    for stage, (size, buffer) in expected.items():
        parameters, memory = state_estimate(job.config.model_copy(update={"zero_stage": stage}), 8)
        assert parameters.total == 427_616_513
        assert memory.total == pytest.approx(427_616_513 * size + buffer)


def test_a_folder_in_use_with_another_config_is_refused_and_the_same_config_is_not(
    tmp_path: Path, shards: Path
) -> None:
    (job,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    with snapshot.written([job.spec], [job.source]):
        pass
    (same,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    snapshot.refuse_other_run(same.spec)
    (other,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards, "seed=1"), LOCAL)
    with pytest.raises(
        ClusterError, match="runs/one is in use by a run with another config .*give another output or --n"
    ):
        submit([other], LOCAL)
    snapshot.refuse_other_run(other.spec, other_config_allowed=True)
    assert read_spec(job.spec.run) == job.spec


def test_a_run_that_a_job_runs_is_refused_a_second_one(tmp_path: Path, shards: Path) -> None:
    (job,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    with snapshot.written([job.spec], [job.source]):
        pass
    program = [sys.executable, "-c", "import time; time.sleep(60)", "launcher.supervise", str(job.spec.run)]
    waiting = subprocess.Popen(program)
    try:
        record_submission(job.spec.run, "local", str(waiting.pid))
        with pytest.raises(ClusterError, match=f"is running already as job {waiting.pid}; watch it with"):
            submit([job], LOCAL)
        assert "stops after the step in hand" in cancel_run(job.spec.run, now=False)
        assert (job.spec.run / "control" / "stop").read_text() == "cancelled by its owner"
    finally:
        waiting.kill()
        waiting.wait()
    with pytest.raises(ClusterError, match="has no job any more"):
        cancel_run(job.spec.run, now=False)


def test_runs_of_a_local_sweep_go_one_after_the_other_and_are_cancelled_one_by_one(tmp_path: Path) -> None:
    """Their interpreter is a script that supervises a run until its folder holds a file."""
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/bash\nuntil [ -e "$3/end" ]; do sleep 0.02; done\n')
    interpreter.chmod(0o755)
    runs = [tmp_path / name for name in "abc"]
    values = {"name": "x", "program": [], "python": str(interpreter), "workdir": tmp_path, "ranks_per_node": 1}
    for run in runs:
        (run / "launch").mkdir(parents=True)
    backend_named("local").submit([JobSpec.model_validate({**values, "run": run}) for run in runs])

    def come_to(*states: str) -> None:
        wait_until(lambda: [standing(run).state for run in runs] == list(states), f"the states {states}", 60)

    try:
        come_to("running", "queued", "queued")
        assert "cancelled job" in cancel_run(runs[2], now=True)
        come_to("running", "queued", "gone")
        (runs[0] / "end").touch()
        come_to("gone", "running", "gone")
        with pytest.raises(ClusterError, match="has no job any more"):
            cancel_run(runs[0], now=False)
        assert not (runs[0] / "control").exists()
        cancel_run(runs[1], now=True)
        come_to("gone", "gone", "gone")
    finally:
        for run in runs:
            (run / "end").touch()


def test_a_snapshot_holds_code_config_and_environment_and_no_secrets(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("TORCH_API_KEY", "not to be told")
    (job,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    with snapshot.written([job.spec], [job.source]):
        pass
    code = job.spec.code
    assert code is not None
    probe = "import mmpretrain.core.errors, launcher.supervise, data_pipeline; print(launcher.__file__)"
    environment = {**variables(job.spec), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(code))
    assert Path(job.spec.program[-1]).read_text() == dump_yaml(job.config)
    told = (job.spec.launch_folder / "environment.json").read_text()
    assert json.loads(told)["environment"]["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "not to be told" not in told and json.loads(told)["packages"]["torch"]


def test_the_control_folder_is_writable_to_the_group_whatever_the_umask(tmp_path: Path, shards: Path) -> None:
    (job,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    before = os.umask(0o077)
    try:
        with snapshot.written([job.spec], [job.source]):
            pass
    finally:
        os.umask(before)
    assert (job.spec.run / "control").stat().st_mode & 0o070 == 0o070


def test_what_fails_while_it_is_queued_is_taken_back(tmp_path: Path, shards: Path) -> None:
    (job,) = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), LOCAL)
    with pytest.raises(ClusterError, match="refused"), snapshot.written([job.spec], [job.source]):
        raise ClusterError("refused")
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_names_the_supervisor_and_the_step_and_makes_nothing(tmp_path: Path, shards: Path) -> None:
    wishes = Wishes("local", ranks_per_node=2, name="two")
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), wishes)
    text = dry_run(jobs, wishes)
    assert f"-m launcher.supervise {tmp_path}/runs/two --local\n" in text and "--nproc-per-node=2" in text
    assert not (tmp_path / "runs").exists()


def test_kubernetes_is_exported_and_not_submitted(tmp_path: Path, shards: Path) -> None:
    wishes = Wishes("kubernetes")
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), wishes)
    with pytest.raises(ClusterError, match=r"only exports; .* --dry-run \| kubectl apply -f -"):
        submit(jobs, wishes)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_backend_is_refused(tmp_path: Path, shards: Path) -> None:
    jobs = plan_jobs(configs_folder() / "demo.yaml", overrides(tmp_path, shards), Wishes("moon"))
    with pytest.raises(ConfigError, match="--to is 'moon'"):
        submit(jobs, Wishes("moon"))
