"""What would run: whole scripts against golden files, the shell's own linter, and the rules of a job's spec."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launcher import render
from launcher.backends.base import backend_named, backends
from launcher.spec import Cluster, JobSpec, Kubernetes, format_time, load_cluster, parse_time
from mmpretrain.cli_submit import Wishes, plan_jobs, sweep_points
from mmpretrain.config import configs_folder
from mmpretrain.core.errors import ClusterError, ConfigError

GOLDEN = Path(__file__).parent / "golden"
LARGE = Wishes("slurm", nodes=64, gpus_per_node=8, time="2-00:00:00")
CLUSTER = Cluster(
    partition="gpu",
    account="vision",
    cpus_per_node=96,
    memory_per_node="0",
    setup=["module load cuda/12.8"],
    environment={"NCCL_SOCKET_IFNAME": "ib0"},
    sbatch={"comment": "", "switches": "4"},
    kubernetes=Kubernetes(image="example/mmpretrain:1", volume_claim="shared"),
)


def large_run() -> JobSpec:
    """64 nodes of 8 GPUs, with what depends on this machine and this commit replaced."""
    (job,) = plan_jobs(configs_folder() / "clip-vit-l14.yaml", ["global_batch_size=65536"], LARGE)
    run = Path("/data/runs/clip-vit-l14")
    return job.spec.model_copy(
        update={
            "run": run,
            "python": "/data/mmpretrain/.venv/bin/python",
            "workdir": Path("/data/mmpretrain"),
            "code": run / "launch" / "code-0000",
            "program": ["-m", "mmpretrain.train", str(run / "launch" / "config-0000.yaml")],
            "cluster": CLUSTER,
        }
    )


def small_run(**changes: object) -> JobSpec:
    values = {"name": "small", "run": "/r/small", "program": ["-m", "mmpretrain.train", "c.yaml"], "python": "python"}
    return JobSpec.model_validate({**values, "workdir": "/w", "ranks_per_node": 1, **changes})


def shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck here")
    command = ["shellcheck", "--shell=bash", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("backend", "file"), [("slurm", "large.sbatch"), ("kubernetes", "large.trainjob.yaml")])
def test_a_run_of_64_nodes_with_8_gpus_is_rendered_as_it_was_reviewed(backend: str, file: str) -> None:
    assert backend_named(backend).render([large_run()]) == (GOLDEN / file).read_text()


def test_the_steps_of_a_large_run_are_those_that_were_reviewed() -> None:
    spec = large_run()
    steps = [render.slurm_tool(spec, "preflight", ["launcher.preflight", str(spec.run), "3"])]
    steps.append(render.slurm_step(spec, "10.0.0.1", 20123, 3))
    assert "".join(f"{argument}\n" for step in steps for argument in step) == (GOLDEN / "large.steps").read_text()


def test_the_batch_scripts_pass_the_shell_linter() -> None:
    spec = large_run()
    shellcheck(render.sbatch_script(spec, ["n7"]))
    shellcheck(render.array_script([spec, spec], Path("/data/a folder/runs.txt")))
    shellcheck(render.tasks_script(spec, 16))


def test_a_trainjob_asks_for_all_ranks_and_mounts_the_claim() -> None:
    manifest = yaml.safe_load(render.train_job(large_run()))
    trainer = manifest["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (64, 8)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 8
    (patch,) = manifest["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared"}
    assert manifest["apiVersion"] == "trainer.kubeflow.org/v1alpha1"


def test_names_with_spaces_and_quotes_stay_one_word_for_the_shell() -> None:
    spec = small_run(run="/r/it's mine", cluster={"environment": {"NOTE": "a 'b' c"}})
    script = render.sbatch_script(spec)
    shellcheck(script)
    line = next(line for line in script.splitlines() if line.startswith("export NOTE"))
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$NOTE"'], capture_output=True, text=True, check=True)
    assert done.stdout == "a 'b' c"


def test_slurm_reads_folders_of_any_name_from_the_batch_script() -> None:
    spec = small_run(run="/r/50% of a#b %j/it's", workdir="/my work", cluster={"sbatch": {"comment": 'a "b"'}})
    directives = {line for line in render.sbatch_script(spec).splitlines() if line.startswith("#SBATCH")}
    assert directives >= {
        "#SBATCH --chdir='/my work'",
        """#SBATCH --output='/r/50%% of a#b %%j/it'"'"'s/logs/job.log'""",
        """#SBATCH --comment='a "b"'""",
    }
    assert "#SBATCH --output='/r/50%% of a#b %%j/it'\"'\"'s/logs/task-%a.log'" in render.tasks_script(spec, 2)


@pytest.mark.parametrize("folder", ["/r/a\\b", "/r/a\nb"])
def test_a_folder_that_slurm_cannot_hold_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="--output would be .*; Slurm takes no backslash or line break there"):
        backend_named("slurm").render([small_run(run=folder)])


def test_bad_nodes_are_excluded_beside_those_of_the_cluster_file() -> None:
    assert "#SBATCH --exclude=n1,n2" in render.sbatch_script(small_run(cluster={"exclude": ["n1"]}), ["n2"])


def test_every_backend_registers_by_being_there() -> None:
    assert sorted(backends()) == ["kubernetes", "local", "slurm"]
    with pytest.raises(ConfigError, match="--to is 'cloud'; choose one of kubernetes, local, slurm"):
        backend_named("cloud")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("5:30", 330), ("1:00:00", 3600), ("2-12", 216000), ("1-00:30", 88200), ("1-01:01:01", 90061)],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ClusterError, match="--time is 'soon'; write minutes, H:MM:SS"):
        parse_time("soon")


def test_times_are_written_in_whole_minutes_rounded_up() -> None:
    assert [format_time(seconds) for seconds in (59, 3600, 90061)] == ["0-00:01:00", "0-01:00:00", "1-01:02:00"]


def test_a_name_that_slurm_would_choke_on_is_refused() -> None:
    with pytest.raises(ValueError, match="expected letters, digits"):
        small_run(name="a b/c")


def test_a_time_limit_that_leaves_no_time_for_its_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="300 s leaves no time before the signal at 300 s"):
        small_run(time_limit_s=300)


def test_a_cluster_file_with_an_unknown_key_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partition: gpu\nacount: me\n")
    with pytest.raises(ConfigError, match=r"site.yaml:2: acount: unknown key; did you mean account\?"):
        load_cluster(tmp_path / "site.yaml")


def test_a_sweep_is_every_combination_with_a_folder_each() -> None:
    assert sweep_points(["optimizer.lr=1e-3,1e-4", "seed=0,1"])[1] == ("optimizer.lr=1e-3", "seed=1")
    wishes = Wishes("slurm", sweep=("optimizer.lr=1e-3,1e-4", "seed=0,1"))
    jobs = plan_jobs(configs_folder() / "demo.yaml", ["output=/r/sweep"], wishes)
    names = ["lr=1e-3_seed=0", "lr=1e-3_seed=1", "lr=1e-4_seed=0", "lr=1e-4_seed=1"]
    assert [job.spec.run for job in jobs] == [Path("/r/sweep") / name for name in names]
    assert [job.config.optimizer.lr for job in jobs] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert "#SBATCH --array=0-3" in backend_named("slurm").render([job.spec for job in jobs])


def test_a_sweep_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sweep is 'seed'; write key=value,value"):
        sweep_points(["seed"])


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_is_written() -> None:
    with pytest.raises(ConfigError, match="global_batch_size 64 is not a multiple of micro_batch_size 32 x 3 ranks"):
        plan_jobs(configs_folder() / "demo.yaml", [], Wishes("slurm", nodes=3))
