"""`python file_writer.py DESCRIPTOR SIZE FILE PARENT`: bring memory that another process shares to disk.

Enter: an open memory file, how many of its bytes count, where they go, and on stdin a word once they are there. Leave:
the file, fsynced, and on stdout one JSON object: its SHA-256 and the seconds it took, or the error. It uses the
standard library alone, so that it starts at once, and dies with the process that started it.

The bytes go past the kernel's cache where the file system can do that: no copy of them drives shards out of memory, and
no flush in the kernel's own time competes with the training beside it, before which this process always steps back.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import signal
import stat
import sys
import time

SLICE_BYTES = 2**24
_BLOCK = 4096
"""Bytes to whose multiples places and lengths are kept past the cache."""
_NICENESS = 10
START = b"copied"
"""What stdin holds once the memory holds what is to be written; nothing where that failed."""
_PR_SET_PDEATHSIG = 1


def write(descriptor: int, size: int, path: str) -> str:
    """Write and fsync the first `size` bytes; returns their SHA-256 in hex."""
    digest = hashlib.sha256()
    content = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    whole = size // _BLOCK * _BLOCK
    with open(path, "wb", buffering=0) as file:  # noqa: PTH123 - importing pathlib takes longer than to start
        target = file.fileno()
        direct = _go_past_cache(target)
        begin = 0
        while begin < size:
            if direct and (begin >= whole or begin % _BLOCK):  # the last bytes, and what follows a write cut short
                direct = _go_past_cache(target, wanted=False)
            part = content[begin : min(begin + SLICE_BYTES, whole if direct else size)]
            try:
                done = os.write(target, part)
            except OSError as fault:
                if not direct or fault.errno != errno.EINVAL:
                    raise
                direct = _go_past_cache(target, wanted=False)
                continue
            digest.update(part[:done])
            begin += done
        os.fsync(target)
    return digest.hexdigest()


def _go_past_cache(target: int, wanted: bool = True) -> bool:
    """Whether writes go past the kernel's cache from now on; a pipe has none, and not every file system lets them."""
    if not stat.S_ISREG(os.fstat(target).st_mode):
        return False
    flags = fcntl.fcntl(target, fcntl.F_GETFL)
    try:
        fcntl.fcntl(target, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return wanted


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once where it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main(descriptor: str, size: str, path: str, parent: str) -> None:
    die_with(int(parent))
    os.nice(_NICENESS)
    if sys.stdin.buffer.read(len(START)) != START:
        sys.exit(1)
    begun = time.monotonic()
    try:
        told: dict[str, object] = {"digest": write(int(descriptor), int(size), path)}
    except OSError as fault:
        told = {"error": str(fault)}
    sys.stdout.write(json.dumps(told | {"seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    main(*sys.argv[1:])
