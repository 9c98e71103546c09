"""A folder of this node that keeps what was fetched, shared by all its ranks and their workers.

Enter: a key and how to fetch what it stands for. Leave: the bytes, fetched once whichever process asks first. Refused:
a folder that cannot be read, written or locked, and a limit that a single entry exceeds.

An entry is written under another name and renamed, so that a reader sees all of it or nothing; writers of one entry
wait for each other by a lock on the unfinished file, which a killed process gives back. `used` holds the bytes that
are there or promised, and is changed under one lock: so the limit holds at every moment, in-flight entries included.
What was read longest ago makes room, but nothing that a reader holds a lock on.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmpretrain.core.errors import DataError

_KEPT_SHARE = 0.9
"""Share of the limit that stays when room is made, so that not every new entry has to look through all."""
_PATIENCE_S = 600.0
"""How long to wait for readers and writers that hold all that is there."""
_UNFINISHED = ".unfinished"


class DiskCache:
    """Entries by key, at most `limit` bytes. Holds no open file between calls; threads and processes may share it."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def ensure(self, key: str, fetch: Callable[[], bytes]) -> bytes | None:
        """See that the entry is there; its content where this call had to fetch it."""
        while not self.holds(key):
            with self._claimed(key) as file:
                if file is None or self.holds(key):  # another finished it since
                    continue
                content = fetch()
                self._reserve(key, file, len(content))
                self._fill(key, file, content)
                return content
        return None

    def holds(self, key: str) -> bool:
        with self._usable():
            return self.path_of(key).exists()

    def read(self, key: str, fetch: Callable[[], bytes], offset: int, length: int) -> tuple[bytes, bool]:
        """Bytes of an entry, and whether they had to be fetched just now."""
        while True:
            with self.held(key) as file:
                if file is not None:
                    return os.pread(file, length, offset), False
            content = self.ensure(key, fetch)
            if content is not None:
                return content[offset : offset + length], True

    @contextmanager
    def held(self, key: str) -> Iterator[int | None]:
        """A descriptor of the entry, which stays while it is held and counts as just read; None where there is none."""
        with self._usable():
            file = _open_entry(self.path_of(key))
        if file is None:
            yield None
            return
        try:
            with self._usable():
                fcntl.flock(file, fcntl.LOCK_SH)
            with suppress(OSError):  # of another user, who alone may mark it
                os.utime(file)
            yield file
        finally:
            os.close(file)

    def drop(self, key: str) -> None:
        """Forget an entry, such as one whose bytes turned out to be damaged."""
        with self._counting() as counter:
            size = _unlink(self.path_of(key))
            counter.add(-size)

    def path_of(self, key: str) -> Path:
        """Where an entry stands while it is there."""
        return self.folder / key[:2] / key

    @contextmanager
    def _claimed(self, key: str) -> Iterator[int | None]:
        """The unfinished file of an entry, locked; None where another process finished it meanwhile."""
        path = self.path_of(key).with_name(key + _UNFINISHED)
        with self._usable():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with self._usable():
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file if _is_at(file, path) else None
        finally:
            if _is_at(file, path):  # the fetch failed
                with self._counting() as counter:
                    counter.add(-_unlink(path))
            os.close(file)

    def _reserve(self, key: str, file: int, size: int) -> None:
        """Count `size` bytes as used, once there is room for them."""
        if size > self.limit:
            raise DataError(
                f"data.cache.limit is {self.limit} bytes, and one part of a shard takes {size}; raise the limit"
            )
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            with self._counting() as counter:
                counter.add(-os.fstat(file).st_size)  # of a writer that was killed
                os.ftruncate(file, 0)
                if counter.used + size > self.limit:
                    counter.set(self._make_room(int(_KEPT_SHARE * self.limit) - size))
                if counter.used + size <= self.limit:
                    os.ftruncate(file, size)
                    counter.add(size)
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.folder}: everything in it is held since {_PATIENCE_S:g} s; raise data.cache.limit"
                )
            time.sleep(0.05)

    def _fill(self, key: str, file: int, content: bytes) -> None:
        path = self.path_of(key)
        with self._usable():
            done = 0
            while done < len(content):
                done += os.pwrite(file, memoryview(content)[done:], done)
        with self._counting(), self._usable():  # or who adds up all entries may find it under neither name
            path.with_name(key + _UNFINISHED).rename(path)

    def _make_room(self, wanted: int) -> int:
        """Remove what was read longest ago until at most `wanted` bytes stay; the bytes that do. Counter is locked."""
        entries = sorted(_entries(self.folder))
        used = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if used <= wanted:
                break
            if _unlink_unless_held(path):
                used -= size
        return used

    @contextmanager
    def _counting(self) -> Iterator["_Counter"]:
        """The number of bytes used, locked."""
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with self._usable():
                fcntl.flock(file, fcntl.LOCK_EX)
            counter = _Counter(file)
            if counter.used < 0:
                counter.set(sum(size for _, size, _ in _entries(self.folder)))
            yield counter
        finally:
            os.close(file)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "free space there, lower data.cache.limit" if full else "give a local folder that can be locked"
            raise DataError(
                f"the cache folder {self.folder} cannot be used ({error.strerror}); {what}, or set data.cache.folder"
            ) from error


class _Counter:
    """An integer in a locked file; -1 where there is none."""

    def __init__(self, file: int) -> None:
        self._file = file
        text = os.pread(file, 32, 0).strip()
        self.used = int(text) if text.isdigit() else -1

    def add(self, size: int) -> None:
        self.set(max(0, self.used + size))

    def set(self, used: int) -> None:
        self.used = used
        os.pwrite(self._file, f"{used:<31}\n".encode(), 0)


def _entries(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """(last read in ns, bytes, path) of all entries, unfinished ones included: their bytes are promised."""
    for group in folder.iterdir():
        if len(group.name) == 2 and group.is_dir():
            for entry in os.scandir(group):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    yield stat.st_mtime_ns, stat.st_size, Path(entry.path)


def _open_entry(path: Path) -> int | None:
    """None where there is none."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _unlink_unless_held(path: Path) -> bool:
    file = _open_entry(path)
    if file is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _unlink(path: Path) -> int:
    """Remove a file; the bytes it had."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def _is_at(file: int, path: Path) -> bool:
    """Whether this open file still stands under this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
