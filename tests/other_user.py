"""What another user may read and write; only root can put on his rights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def as_another_user_in(folder: Path) -> Iterator[None]:
    """Inside, paths are relative to a folder that all may read, whoever may enter those above it."""
    if os.getuid() != 0:
        pytest.skip("only root can act as another user")
    before = Path.cwd()
    folder.chmod(0o755)
    os.chdir(folder)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.chdir(before)
