"""Watches what Python does while a stranger's input is read: files elsewhere, programs, sockets, pickles.

Enter: the one folder that may be used. Leave: nothing, or a failure that names what was done. Files of the interpreter,
its libraries and this checkout may be read. What C libraries open by themselves is not seen.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READABLE = tuple(
    f"{Path(place).resolve()}/"
    for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[1], "/usr", "/lib", "/proc", "/sys", "/dev")
)
_FORBIDDEN = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"})
_PICKLE = "pickle.find_class"
_state = threading.local()


class Breach(AssertionError):
    """Something was done that no input may bring about."""


@contextmanager
def only_within(folder: Path, pickles: bool = False) -> Iterator[None]:
    """What this thread does inside may open files below `folder` alone. `pickles`: those of our own making are read."""
    _install()
    _state.folder, _state.breaches, _state.pickles = f"{folder.resolve()}/", [], pickles
    try:
        yield
        found = _state.breaches
    finally:
        _state.folder = None
    if found:
        raise Breach("; ".join(found))


def _install() -> None:
    """Hooks stay until the process ends, so there is one."""
    if not getattr(_install, "done", False):
        sys.addaudithook(_see)
        _install.done = True  # type: ignore[attr-defined]


def _see(event: str, arguments: tuple[object, ...]) -> None:
    folder = getattr(_state, "folder", None)
    if folder is None:
        return
    if event == "open":
        _see_open(folder, arguments)
    elif event in _FORBIDDEN or (event == _PICKLE and not _state.pickles):
        _state.breaches.append(f"{event} {arguments[:2]}")


def _see_open(folder: str, arguments: tuple[object, ...]) -> None:
    path, _, flags = (*arguments, None, None, None)[:3]
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a descriptor that is open already
    _state.folder = None  # what follows may look at files itself
    place = os.path.realpath(os.fsdecode(path))
    _state.folder = folder
    writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and place != os.devnull
    compiles = "/__pycache__/" in place
    if f"{place}/".startswith(folder) or (place.startswith(_READABLE) and (compiles or not writes)):
        return
    _state.breaches.append(f"{'wrote' if writes else 'read'} {place}")
