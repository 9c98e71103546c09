"""What a rank's file of a checkpoint will hold, copied into memory beside training and written by a process.

Enter: named tensors. Leave: the bytes of a safetensors file in memory that is kept from save to save, and a process
that brings them to disk: it takes no lock of this interpreter, so that training goes on meanwhile, and it dies with the
rank. What the file system refuses is told when the file is waited for.

Forward and backward only read what an optimizer updates, so it is copied while they run: by a thread, whose copies hold
no lock of the interpreter, and on a GPU in a stream of its own into memory that the GPU writes to by itself.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

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
        self._writing: Writing | None = None

    def write(self, path: Path, now: Mapping[str, Tensor], later: Mapping[str, Tensor]) -> Writing:
        """Begin to write a file of these tensors, from whatever device; what the memory held is gone.

        `now` may change when this returns, `later` only after `wait_until_copied` of what it returns.
        """
        assert self._writing is None or self._writing.is_over, "a file that is being written may not change"
        tensors = {**now, **later}
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        header = _header(ordered)
        size = len(header) + sum(tensor.nbytes for _, tensor in ordered)
        memory = self._reserve(size)
        memory.content[: len(header)].copy_(torch.frombuffer(header, dtype=torch.uint8))
        targets, place = dict[str, Tensor](), len(header)
        for name, tensor in ordered:
            targets[name] = memory.content[place : place + tensor.nbytes].view(tensor.dtype)
            place += tensor.nbytes
        _copy({name: targets[name] for name in now}, now)
        self._writing = Writing(memory.descriptor, size, path, _copying({name: targets[name] for name in later}, later))
        return self._writing

    def _reserve(self, size: int) -> _SharedMemory:
        if self._memory is None or self._memory.content.numel() < size:
            self._memory = None  # given back first
            self._memory = _SharedMemory(size)
        return self._memory


def _copy(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(tensors[name].detach().reshape(-1), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _copying(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """A copy of what the tensors hold by now, for another thread."""
    device = next((one.device for one in tensors.values() if one.is_cuda), None)
    if device is None:
        return lambda: _copy(targets, tensors)
    computed = torch.cuda.current_stream(device).record_event()

    def copy() -> None:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_event(computed)
        with torch.cuda.stream(stream):
            _copy(targets, tensors)

    return copy


class _SharedMemory:
    """Memory behind a file descriptor, whatever the size of /dev/shm; gone with the last process that has it open."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("checkpoint")
        weakref.finalize(self, os.close, self.descriptor)
        os.posix_fallocate(self.descriptor, 0, size)
        self.content = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        _let_gpu_write(self)


def _let_gpu_write(memory: _SharedMemory) -> None:
    """Pin the memory, where there is a GPU; one that refuses copies by way of memory of its own, which takes longer."""
    if not torch.cuda.is_available():
        return
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(memory.content.data_ptr(), memory.content.numel(), 0)) == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.content.data_ptr())


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
    """A process that writes the first bytes of a memory file to disk, once a thread has copied them there."""

    def __init__(self, descriptor: int, size: int, path: Path, copy: Callable[[], None]) -> None:
        self.size = size
        self._fault: Exception | None = None
        arguments = [str(one) for one in (descriptor, size, path, os.getpid())]
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD)  # which the process inherits
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", file_writer.__file__, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(descriptor,),
            )
            self._copying = Thread(target=self._copy_and_start, args=(copy,), daemon=True)
            self._copying.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def _copy_and_start(self, copy: Callable[[], None]) -> None:
        assert self._process.stdin is not None
        try:
            copy()
            self._process.stdin.write(file_writer.START)
        except (RuntimeError, OSError) as fault:
            self._fault = fault
        finally:
            with suppress(BrokenPipeError):  # of a process that was killed, which `wait` tells
                self._process.stdin.close()

    def wait_until_copied(self) -> None:
        """Until the tensors may change."""
        self._copying.join()

    @property
    def is_over(self) -> bool:
        """Whether it ended, well or not."""
        return self._process.poll() is not None

    def wait(self) -> WrittenFile:
        """The file once it is on disk; CheckpointError says why it is not."""
        assert self._process.stdout is not None
        self.wait_until_copied()
        output = self._process.stdout.read()
        code = self._process.wait()
        if isinstance(self._fault, RuntimeError):
            raise CheckpointError(f"it could not be copied ({self._fault})")
        if code:
            how = f"ended with {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
            raise CheckpointError(f"the process that writes it {how}")
        told = json.loads(output)
        if "error" in told:
            raise CheckpointError(told["error"])
        return WrittenFile(self.size, told["digest"], told["seconds"])
