"""Whether what a list names, or what stands in a folder, really lies in that folder; and folders written whole.

Enter: a folder, and a path or a name. Leave: the answer, of which whoever asked says what is refused; or a folder
beside the one that is to be.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path below a folder leads out of it, by `..` or by a link."""
    return not path.resolve().is_relative_to(folder.resolve())


def is_plain_name(name: object) -> bool:
    """Whether it names something right inside a folder, and nothing else."""
    return isinstance(name, str) and name not in ("", "..") and "\0" not in name and PurePosixPath(name).name == name


@contextmanager
def made_beside(out: Path) -> Iterator[Path]:
    """A new folder on the file system of `out`, gone afterwards unless it was renamed to it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
