"""What a rank's file of a checkpoint will hold, copied into memory at once and written by a process beside the rank.

Enter: named tensors. Leave: the bytes of a safetensors file in memory that is kept from save to save, and a process
that brings them to disk: it takes no lock of this interpreter, so that training goes on meanwhile, and it dies with the
rank. What the file system refuses is told when the file is waited for.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmpretrain.core.errors import CheckpointError
from mmpretrain.training import file_writer

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the safetensors format calls them."""
_ALIGNMENT = 8
"""Bytes to a multiple of which the header is filled up."""
_UNHEARD = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""What schedulers and terminals send to a rank and all its children: the rank decides what follows."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that is on disk for good."""

    size: int
    digest: str
    """SHA-256 of what was to be written, in hex."""
    seconds: float


class Snapshot:
    """The bytes of one file, in memory that is allocated at the first use and kept for the next."""

    def __init__(self) -> None:
        self._memory: _SharedMemory | None = None
        self._size = 0
        self._writing: Writing | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors, from whatever device; what it held is gone."""
        assert self._writing is None or self._writing.is_over, "a file that is being written may not change"
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        header = _header(ordered)
        self._size = len(header) + sum(tensor.nbytes for _, tensor in ordered)
        content = self._reserve(self._size).content
        content[: len(header)].copy_(torch.frombuffer(header, dtype=torch.uint8))
        place = len(header)
        for _, tensor in ordered:
            end = place + tensor.nbytes
            content[place:end].view(tensor.dtype).copy_(tensor.detach().reshape(-1), non_blocking=True)
            place = end
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, path: Path) -> Writing:
        """Begin to write what was taken into a file."""
        assert self._memory is not None, "nothing was taken"
        self._writing = Writing(self._memory.descriptor, self._size, path)
        return self._writing

    def _reserve(self, size: int) -> _SharedMemory:
        if self._memory is None or self._memory.content.numel() < size:
            self._memory = None  # given back first
            self._memory = _SharedMemory(size)
        return self._memory


class _SharedMemory:
    """Memory behind a file descriptor, whatever the size of /dev/shm; gone with the last process that has it open."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("checkpoint")
        weakref.finalize(self, os.close, self.descriptor)
        os.posix_fallocate(self.descriptor, 0, size)
        self.content = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)


def _header(ordered: Sequence[tuple[str, Tensor]]) -> bytearray:
    """Where each tensor lies among the bytes that follow, as safetensors says it."""
    places: dict[str, object] = {}
    begin = 0
    for name, tensor in ordered:
        end = begin + tensor.nbytes
        places[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(places, separators=(",", ":")).encode()
    length = math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT
    return bytearray(length.to_bytes(8, "little") + text.ljust(length))


class Writing:
    """A process that writes the first bytes of a memory file to disk."""

    def __init__(self, descriptor: int, size: int, path: Path) -> None:
        self.size = size
        arguments = [str(one) for one in (descriptor, size, path, os.getpid())]
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD)  # which the process inherits
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", file_writer.__file__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(descriptor,),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    @property
    def is_over(self) -> bool:
        """Whether it ended, well or not."""
        return self._process.poll() is not None

    def wait(self) -> WrittenFile:
        """The file once it is on disk; CheckpointError says why it is not."""
        output, _ = self._process.communicate()
        code = self._process.returncode
        if code:
            how = f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
            raise CheckpointError(f"the process that writes it {how}")
        told = json.loads(output)
        if "error" in told:
            raise CheckpointError(told["error"])
        return WrittenFile(self.size, told["digest"], told["seconds"])
