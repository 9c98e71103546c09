"""The run folder of a job before it is submitted: its code, its config, its environment, its spec.

Enter: a JobSpec with the resolved config. Leave: `launch/` in the run folder, written whole or not at all. Refused: a
folder that cannot be written, that holds a run with another config, or whose disk is full.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from launcher.backends.base import refuse_second_job
from launcher.preflight import code_hash
from launcher.spec import LAUNCH, JobSpec, job_file
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError

PACKAGES = ("mmpretrain", "data_pipeline", "launcher")
_TOLD = ("CUDA", "NCCL", "TORCH", "GLOO", "FI_", "UCX", "OMPI", "LOADEDMODULES", "SLURM_CONF", "VIRTUAL_ENV", "CONDA")
_KEPT_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass(frozen=True)
class Source:
    """What is copied beside the spec."""

    root: Path
    """Folder of the packages."""
    config_yaml: str
    """The resolved run config."""


def running_source(config_yaml: str) -> Source:
    """The code this process runs."""
    return Source(Path(__file__).resolve().parents[1], config_yaml)


def code_folder(run: Path, source: Source) -> Path:
    """Where a snapshot of this code lies; another code gets another folder, so that a running job keeps its own."""
    return run / LAUNCH / f"code-{_hash(source)}"


def config_file(run: Path, config_hash: str) -> Path:
    """The resolved config that a job reads."""
    return run / LAUNCH / f"config-{config_hash}.yaml"


def refuse_other_run(spec: JobSpec) -> None:
    """A run folder belongs to one config, and to one job at a time."""
    if job_file(spec.run).is_file():
        there = JobSpec.model_validate_json(job_file(spec.run).read_text())
        if there.config_hash != spec.config_hash:
            raise ClusterError(
                f"{spec.run} is in use by a run with another config ({there.launch_folder}/"
                f"config-{there.config_hash}.yaml); give another output or --name, or the config it was begun with"
            )
    refuse_second_job(spec.run)


def write(spec: JobSpec, source: Source) -> None:
    """Make the run folder ready for `spec`, all of it or nothing."""
    with _all_or_nothing(spec.run):
        launch = spec.launch_folder
        launch.mkdir(parents=True, exist_ok=True)
        (spec.run / "logs").mkdir(exist_ok=True)
        run_files.make_control_folder(spec.run / run_files.CONTROL)
        _copy_code(spec.run, source)
        run_files.replace(config_file(spec.run, spec.config_hash), source.config_yaml)
        run_files.replace(launch / "environment.json", json.dumps(environment(), indent=2) + "\n")
        run_files.replace(job_file(spec.run), spec.model_dump_json(indent=2) + "\n")


@contextmanager
def _all_or_nothing(run: Path) -> Iterator[None]:
    """Take back what was begun in a folder that was not there before."""
    begun = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        yield
    except OSError as fault:
        if begun:
            shutil.rmtree(begun[0], ignore_errors=True)
            for folder in begun[1:]:
                if folder.is_dir():
                    folder.rmdir()
        raise ClusterError(
            f"the run folder {run} cannot be written ({fault.strerror}); free space or quota there, or set output to a "
            f"writable folder"
        ) from fault


def _copy_code(run: Path, source: Source) -> None:
    final = code_folder(run, source)
    if final.is_dir():
        return
    partial = Path(tempfile.mkdtemp(prefix=".code-", dir=run / LAUNCH))
    try:
        for package in PACKAGES:
            shutil.copytree(source.root / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
        partial.chmod(0o755)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _hash(source: Source) -> str:
    return "-".join(code_hash(source.root / package)[:4] for package in PACKAGES)


def environment() -> dict[str, object]:
    """What a later reader needs to know of where a job was submitted; no secrets."""
    told = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_TOLD) and not any(word in name for word in _KEPT_SECRET)
    }
    packages = {one.name: one.version for one in metadata.distributions()}
    host = os.uname()
    return {
        "python": sys.version,
        "interpreter": sys.executable,
        "system": f"{host.sysname} {host.release} on {host.nodename}",
        "packages": dict(sorted(packages.items())),
        "environment": told,
    }
