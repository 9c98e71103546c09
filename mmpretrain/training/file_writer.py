"""`python file_writer.py DESCRIPTOR SIZE FILE PARENT`: bring memory that another process shares to disk.

Enter: an open memory file, how many of its bytes count, and where they go. Leave: the file, fsynced, and on stdout one
JSON object: its SHA-256 and the seconds it took, or the error. It uses the standard library alone, so that it starts at
once, and dies with the process that started it.
"""

import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
import time

SLICE_BYTES = 2**24
_PR_SET_PDEATHSIG = 1


def write(descriptor: int, size: int, path: str) -> str:
    """Write and fsync the first `size` bytes; returns their SHA-256 in hex."""
    digest = hashlib.sha256()
    content = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    with open(path, "wb", buffering=0) as file:  # noqa: PTH123 - importing pathlib takes longer than to start
        for begin in range(0, size, SLICE_BYTES):
            part = content[begin : begin + SLICE_BYTES]
            digest.update(part)
            while part:
                part = part[file.write(part) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once where it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main(descriptor: str, size: str, path: str, parent: str) -> None:
    die_with(int(parent))
    begun = time.monotonic()
    try:
        told: dict[str, object] = {"digest": write(int(descriptor), int(size), path)}
    except OSError as fault:
        told = {"error": str(fault)}
    sys.stdout.write(json.dumps(told | {"seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    main(*sys.argv[1:])
