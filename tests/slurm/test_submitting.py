"""What a real cluster refuses before anything is made, and arrays: a sweep, and tasks that divide work on shards."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import overrides, preempt, submit_run, wishes_for

from launcher import slurm_commands
from launcher.backends.base import standing
from launcher.cancelling import cancel_run
from launcher.chaos.subject import Subject, wait_until
from launcher.dev_cluster import settings
from launcher.spec import JobState
from launcher.status import status_of
from mmpretrain.cli_submit import Job, Wishes, dry_run, plan_jobs, submit
from mmpretrain.cli_tasks import submit_array
from mmpretrain.config import configs_folder
from mmpretrain.core.config import dump_yaml
from mmpretrain.core.errors import ClusterError, ConfigError

pytestmark = pytest.mark.usefixtures("two_nodes")
WRITES_OUTCOME = Path(__file__).with_name("writes_outcome.py")
CHAOS = configs_folder() / "chaos.yaml"


def test_an_unknown_partition_is_refused_with_slurms_reason_and_nothing_is_made(project: Path) -> None:
    with pytest.raises(ClusterError, match="Slurm refuses sbatch: .*invalid partition specified: moon"):
        submit_run(project, cluster=settings(partition="moon"))
    assert not (project / "run").exists()


def test_more_nodes_than_there_are_is_refused_and_nothing_is_made(project: Path) -> None:
    with pytest.raises(ClusterError, match="Slurm refuses sbatch: .*"):
        submit_run(project, "micro_batch_size=8", nodes=3)
    assert not (project / "run").exists()


def test_a_run_that_waits_is_told_so_and_cancelled_without_having_run(project: Path) -> None:
    preempt(nodes=2, seconds=120)
    wait_until(lambda: slurm_commands.queued_jobs(["--partition=urgent", "--states=RUNNING"]), "the urgent job")
    run = submit_run(project)
    assert standing(run.run).state is JobState.QUEUED
    assert status_of(run.run).state == "queued"
    with pytest.raises(ClusterError, match="is queued already as job"):
        submit_run(project)
    assert "cancelled job" in cancel_run(run.run, now=False)
    run.wait_for_end()
    assert run.history == [] and run.log == ""
    urgent = slurm_commands.queued_jobs(["--partition=urgent"])
    subprocess.run(["scancel", *(job.job for job in urgent)], check=True, timeout=30)


def test_the_points_of_a_sweep_run_as_one_array_with_a_folder_each(project: Path) -> None:
    wishes = wishes_for(settings(), project, nodes=1)
    wishes = Wishes("slurm", cluster=wishes.cluster, time="10", sweep=("seed=0,1",))
    runs = project / "it's 50%#1"
    jobs = plan_jobs(CHAOS, [*overrides(project), f"output={runs}"], wishes)
    planned = [Job(job.spec.model_copy(update={"program": [str(WRITES_OUTCOME)]}), job.config) for job in jobs]
    assert "--array=0-1" in dry_run(planned, wishes)
    array, _ = submit(planned, wishes)
    for seed in (0, 1):
        run = Subject(runs / f"seed={seed}")
        run.wait_for_end()
        assert [one.ending for one in run.history] == ["completed"], run.log
        assert (run.history[0].reason, run.history[0].job) == (f"seed={seed}", f"{array}_{seed}")
    assert (runs / "seed=0" / "launch" / "runs.log").is_file()


def test_shards_are_indexed_by_an_array_of_tasks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    shutil.copytree(project / "set" / "train", project / "shards")
    indexes = sorted((project / "shards").glob("*.index"))
    for index in indexes:
        index.unlink()
    (project / "site.yaml").write_text(dump_yaml(settings()))
    job = submit_array(["index", str(project / "shards")], "slurm", 2, project / "site.yaml", joined=False)
    wait_until(lambda: slurm_commands.queued_job(job) is None, "the end of the tasks")
    logs = "\n".join(path.read_text() for path in sorted((project / "runs").rglob("task-*.log")))
    assert sorted((project / "shards").glob("*.index")) == indexes, logs


def test_tasks_without_a_cluster_are_refused() -> None:
    with pytest.raises(ConfigError, match="saw --to local --tasks None; tasks go to a cluster"):
        submit_array(["index", "x"], "local", None, None, joined=False)
