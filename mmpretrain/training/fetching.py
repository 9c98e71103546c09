"""The newest checkpoint of an object store, for a run whose own folder has none.

Enter: where a run uploads its checkpoints, and its folder of them. Leave: the newest whole one, if there is any, as its
manifest describes it. Refused: copies of which each is damaged, and a store that does not answer: starting from scratch
would be a surprise.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_pipeline.stores import AbsentObject, Patience, check_client, list_subfolders, read_file, read_whole
from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.run_files import MANIFEST, saved_checkpoints
from mmpretrain.training.manifest import damage, read_manifest

log = logging.getLogger(__name__)
_PATIENCE = Patience(8, 60.0, "or set checkpoint.upload to null to start without it")
_LEAST_BYTES_PER_S = 2**20


def fetch_newest(url: str, folder: Path) -> None:
    """Copy the newest checkpoint below `url` into `folder`, unless there is one. One rank calls it."""
    check_client(url)
    if saved_checkpoints(folder):
        return
    faults = []
    for source, content in _whole_ones(url):
        fault = _fetch(source, content, folder / PurePosixPath(source).name)
        if fault is None:
            log.warning("%s has no checkpoint; the run goes on from %s", folder.parent, source)
            return
        log.warning("checkpoint %s is damaged (%s); trying the one before", source, fault)
        faults.append(fault)
    if faults:
        raise CheckpointError(
            f"no valid checkpoint among {len(faults)} in {url} ({faults[0]}); name another folder in checkpoint.upload "
            f"to start again from step 0"
        )


def _whole_ones(url: str) -> Iterator[tuple[str, bytes]]:
    """Checkpoints with their manifests, the newest first; one without is an upload that was cut off."""
    for one in reversed(list_subfolders(url, _PATIENCE)):
        try:
            yield one.url, read_whole(f"{one.url}/{MANIFEST}", _PATIENCE)
        except AbsentObject:
            log.info("%s has no manifest and is passed over", one.url)


def _fetch(source: str, content: bytes, final: Path) -> str | None:
    """Put one in place; what is wrong with it otherwise."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / MANIFEST).write_bytes(content)
    try:
        manifest = read_manifest(partial)
        for name, (size, _) in manifest.files.items():
            patience = Patience(_PATIENCE.attempts, 60.0 + size / _LEAST_BYTES_PER_S, _PATIENCE.advice)
            read_file(f"{source}/{name}", partial / name, patience)
        fault = damage(partial, manifest, manifest.files)
    except (CheckpointError, AbsentObject) as error:
        fault = str(error)
    if fault is None:
        partial.rename(final)
    else:
        shutil.rmtree(partial, ignore_errors=True)
    return fault
