"""The run folder of a job before it is submitted: its code, its config, its environment, its spec.

Enter: a JobSpec with the resolved config. Leave: `launch/` in the run folder, written whole or not at all. Refused: a
folder that cannot be written, that holds a run with another config, or whose disk is full.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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


def refuse_other_run(spec: JobSpec, other_config_allowed: bool = False) -> None:
    """A run folder belongs to one config, unless its owner says otherwise, and to one job at a time."""
    if job_file(spec.run).is_file() and not other_config_allowed:
        there = JobSpec.model_validate_json(job_file(spec.run).read_text())
        if there.config_hash != spec.config_hash:
            raise ClusterError(
                f"{spec.run} is in use by a run with another config ({there.launch_folder}/"
                f"config-{there.config_hash}.yaml); give another output or --name, the config it was begun with, or "
                f"--change-config if it is to go on with this one"
            )
    refuse_second_job(spec.run)


@contextmanager
def written(specs: Sequence[JobSpec], sources: Sequence[Source]) -> Iterator[None]:
    """Make the run folders ready; where that fails, or what is done with them inside, new folders are taken back."""
    begun = [folder for spec in specs for folder in (spec.run, *spec.run.parents) if not folder.exists()]
    try:
        for spec, source in zip(specs, sources, strict=True):
            _write(spec, source)
        yield
    except OSError as fault:
        _take_back(begun)
        raise ClusterError(
            f"the run folder {specs[0].run} cannot be written ({fault.strerror}); free space or quota there, or set "
            f"output to a writable folder"
        ) from fault
    except BaseException:
        _take_back(begun)
        raise


def _take_back(begun: Iterable[Path]) -> None:
    """Deepest first, so that folders above go once they are empty."""
    for folder in sorted(set(begun), key=lambda one: -len(one.parts)):
        if (folder / LAUNCH).is_dir():
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write(spec: JobSpec, source: Source) -> None:
    launch = spec.launch_folder
    launch.mkdir(parents=True, exist_ok=True)
    (spec.run / "logs").mkdir(exist_ok=True)
    run_files.make_control_folder(spec.run / run_files.CONTROL)
    _copy_code(spec.run, source)
    run_files.replace(config_file(spec.run, spec.config_hash), source.config_yaml)
    run_files.replace(launch / "environment.json", json.dumps(environment(), indent=2) + "\n")
    run_files.replace(job_file(spec.run), spec.model_dump_json(indent=2) + "\n")


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
