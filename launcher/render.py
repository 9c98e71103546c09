"""From a job to the very text and arguments that run it: pure functions, so that a dry run cannot differ from a run.

Enter: a JobSpec. Leave: the sbatch script, the srun and torchrun arguments, the TrainJob manifest. Refused: characters
that no #SBATCH line holds; whatever else is wrong with a job is refused when its spec is made.
"""

import shlex
import string
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from launcher.spec import JobSpec, format_time
from mmpretrain.core.errors import ConfigError

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Those that torchrun hands on to its ranks; by default SIGUSR1 would kill it and leave them orphans."""


class _Template(string.Template):
    """Placeholders are @{name}, since $ belongs to the shell."""

    delimiter = "@"


def template_folder() -> Path:
    """Where the shell templates lie: the checkout, or the installed copy."""
    checkout = Path(__file__).resolve().parents[1] / "slurm"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "mmpretrain" / "slurm"


def sbatch_script(spec: JobSpec, exclude: Sequence[str] = ()) -> str:
    """The batch script of one run."""
    log = spec.run / "logs" / "job.log"
    return _script(spec, directives(spec, exclude, log), shlex.quote(str(spec.run)), "")


def array_script(specs: Sequence[JobSpec], list_file: Path, exclude: Sequence[str] = ()) -> str:
    """One job array with a task for each run; `list_file` holds the run folders, one a line."""
    first = specs[0]
    lines = [*directives(first, exclude, list_file.with_suffix(".log")), f"#SBATCH --array=0-{len(specs) - 1}"]
    choice = (
        f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(list_file))})\n'
        'exec >>"$run/logs/job.log" 2>&1\n'
        + ("" if first.code is None else f'export PYTHONPATH="$run"/launch/{first.code.name}\n')
    )
    return _script(first, lines, '"$run"', choice)


def tasks_script(spec: JobSpec, tasks: int) -> str:
    """One job array of idempotent tasks on a single node each; the program is told which by --part I/N."""
    log = spec.run / "logs" / "task-%a.log"
    lines = [*directives(spec, (), log), f"#SBATCH --array=0-{tasks - 1}"]
    command = shlex.join([*spec.cluster.container, spec.python, *spec.program])
    template = _Template((template_folder() / "tasks.sbatch").read_text())
    return template.substitute(
        directives="\n".join(lines), environment=_environment(spec), command=command, tasks=str(tasks)
    )


def join_script(spec: JobSpec) -> str:
    """The same work in one job, for after the tasks."""
    lines = directives(spec, (), spec.run / "logs" / "join.log")
    command = shlex.join([*spec.cluster.container, spec.python, *spec.program])
    return "\n".join(["#!/bin/bash", *lines, "set -euo pipefail", _environment(spec), f"exec {command}", ""])


def _script(spec: JobSpec, lines: Sequence[str], run: str, choice: str) -> str:
    template = _Template((template_folder() / "job.sbatch").read_text())
    return template.substitute(
        directives="\n".join(lines),
        environment=_environment(spec),
        choice=choice,
        python=shlex.quote(spec.python),
        run=run,
    )


def directives(spec: JobSpec, exclude: Sequence[str], log: Path) -> list[str]:
    """The #SBATCH lines; `%` in the name of the log is Slurm's, in its folder it is the folder's own."""
    cluster = spec.cluster
    options: dict[str, str | None] = {
        "job-name": spec.name,
        "chdir": str(spec.workdir),
        "output": f"{str(log.parent).replace('%', '%%')}/{log.name}",
        "open-mode": "append",
        "nodes": str(spec.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(spec.gpus_per_node) if spec.gpus_per_node else None,
        "cpus-per-task": None if cluster.cpus_per_node is None else str(cluster.cpus_per_node),
        "mem": cluster.memory_per_node,
        "time": None if spec.time_limit_s is None else format_time(spec.time_limit_s),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": ",".join([*cluster.exclude, *exclude]) or None,
        "signal": f"B:USR1@{cluster.signal_lead_s}",
        "requeue": "",
        "exclusive": "" if spec.gpus_per_node >= 8 else None,
    }
    options |= cluster.sbatch
    chosen = {name: value for name, value in options.items() if value is not None}
    return [
        f"#SBATCH --{name}={_quoted(name, value)}" if value else f"#SBATCH --{name}" for name, value in chosen.items()
    ]


def _quoted(name: str, value: str) -> str:
    """As Slurm reads it, which takes quotes for what the shell does, but a backslash for an escape within them too."""
    if "\\" in value or "\n" in value:
        raise ConfigError(f"--{name} would be {value!r}; Slurm takes no backslash or line break there, choose another")
    return shlex.quote(value)


def _environment(spec: JobSpec) -> str:
    """Setup lines, then variables: a value is fixed when it is submitted, whatever the shell of the job says."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables(spec).items())]
    return "\n".join([*spec.cluster.setup, *exports])


def variables(spec: JobSpec) -> dict[str, str]:
    """What every process of the job finds in its environment."""
    fixed = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": _threads(spec)}
    fixed["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(spec.cluster.shutdown_s)
    if spec.code is not None:
        fixed |= {"PYTHONPATH": str(spec.code), "PYTHONSAFEPATH": "1"}  # a checkout in the working folder would win
    if spec.gpus_per_node:
        fixed |= _flight_recorder(spec.run)
    return fixed | spec.cluster.environment


def _threads(spec: JobSpec) -> str:
    """Ranks that share processors with all their threads run many times slower."""
    return str(max(1, (spec.cluster.cpus_per_node or 1) // spec.ranks_per_node // 2))


def _flight_recorder(run: Path) -> dict[str, str]:
    """NCCL's last collectives, written when one of them times out."""
    return {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(run / "stacks" / "nccl-"),
    }


def torchrun(spec: JobSpec, address: str, port: int, attempt: int) -> list[str]:
    """One node's launcher, without the number of its node; static rendezvous makes the first node rank 0's."""
    return [
        *spec.cluster.container,
        spec.python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={spec.nodes}",
        f"--nproc-per-node={spec.ranks_per_node}",
        "--rdzv-backend=static",
        f"--master-addr={address}",
        f"--master-port={port}",
        f"--rdzv-id={spec.name}-{attempt}",
        "--max-restarts=0",
        f"--signals-to-handle={SIGNALS}",
    ]


def local_step(spec: JobSpec, port: int, attempt: int) -> list[str]:
    """All ranks of an attempt on this machine."""
    return [*torchrun(spec, "127.0.0.1", port, attempt), "--node-rank=0", *spec.program]


def slurm_step(spec: JobSpec, address: str, port: int, attempt: int) -> list[str]:
    """All ranks of an attempt: one launcher a node, which learns the number of its node there."""
    command, program = shlex.join(torchrun(spec, address, port, attempt)), shlex.join(spec.program)
    launch = f'{command} --node-rank="$SLURM_NODEID" {program}'
    return [*srun(spec, f"train-{attempt}"), "--kill-on-bad-exit=1", "--wait=60", "bash", "-c", f"exec {launch}"]


def slurm_tool(spec: JobSpec, name: str, arguments: Sequence[str]) -> list[str]:
    """A small Python program of ours once on each node, beside whatever runs there."""
    overlap = ["--overlap", *(["--gpus-per-node=0"] if spec.gpus_per_node and name == "signal" else [])]
    return [*srun(spec, name), *overlap, *spec.cluster.container, spec.python, "-m", *arguments]


def srun(spec: JobSpec, name: str) -> list[str]:
    """One task on each node of the allocation."""
    cpus = [] if spec.cluster.cpus_per_node is None else [f"--cpus-per-task={spec.cluster.cpus_per_node}"]
    places = [f"--nodes={spec.nodes}", f"--ntasks={spec.nodes}", "--ntasks-per-node=1"]
    return ["srun", f"--job-name={name}", *places, *cpus, *spec.cluster.srun]


def train_job(spec: JobSpec) -> str:
    """The same job as a TrainJob of Kubeflow Trainer v2 (API v1alpha1), for kubectl apply -f."""
    settings = spec.cluster.kubernetes
    limits = {"nvidia.com/gpu": spec.gpus_per_node} if spec.gpus_per_node else {}
    if spec.cluster.cpus_per_node is not None:
        limits["cpu"] = spec.cluster.cpus_per_node
    trainer = {
        "image": settings.image,
        "numNodes": spec.nodes,
        "numProcPerNode": spec.ranks_per_node,
        "command": ["torchrun", f"--signals-to-handle={SIGNALS}", *spec.program],
        "env": [{"name": name, "value": value} for name, value in sorted(_pod_variables(spec).items())],
        **({"resourcesPerNode": {"limits": limits, "requests": dict(limits)}} if limits else {}),
    }
    body: dict[str, object] = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": settings.runtime},
        "trainer": trainer,
    }
    if settings.volume_claim is not None:
        body["runtimePatches"] = [_volume_patch(settings.volume_claim, settings.mount)]
    manifest = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": _kubernetes_name(spec.name), "namespace": settings.namespace},
        "spec": body,
    }
    return yaml.safe_dump(manifest, sort_keys=False, width=110)


def _pod_variables(spec: JobSpec) -> dict[str, str]:
    return {name: value for name, value in variables(spec).items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}


def _volume_patch(claim: str, mount: str) -> dict[str, object]:
    pod = {
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "data", "mountPath": mount}]}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": "mmpretrain", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def _kubernetes_name(name: str) -> str:
    """Lower-case letters, digits and -, at most 50 characters."""
    return "".join(one if one.isalnum() else "-" for one in name.lower())[:50].strip("-")
