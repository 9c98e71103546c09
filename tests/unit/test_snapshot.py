"""A rank's file in memory and the process that writes it: what safetensors reads, and what goes wrong is told."""

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from child_processes import children
from safetensors.torch import load_file
from torch import Tensor

from mmpretrain.core.errors import CheckpointError
from mmpretrain.training.snapshot import Snapshot, Writing


def tensors(rows: int) -> dict[str, Tensor]:
    """One of each kind that a checkpoint holds, and some that safetensors could lay out otherwise."""
    generator = torch.Generator().manual_seed(rows)
    random = torch.randn(rows, 3, generator=generator)
    found = {f"of/{dtype}": (random * 50).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)}
    found |= {f"of/{dtype}": (random.abs() * 20).to(dtype) for dtype in (torch.int64, torch.int32, torch.int16)}
    found |= {f"of/{dtype}": (random.abs() * 20).to(dtype) for dtype in (torch.int8, torch.uint8)}
    return found | {
        "master/ä.weight/7": random[:, 1],
        "turned": random.t(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
        "flags": random > 0,
    }


def test_the_file_is_what_safetensors_reads_whatever_was_taken_before(tmp_path: Path) -> None:
    snapshot = Snapshot()
    for number, rows in enumerate((5, 2, 70_001)):
        taken, path = tensors(rows), tmp_path / f"{number}.safetensors"
        now = {name: tensor for name, tensor in taken.items() if name.startswith("of/")}
        written = snapshot.write(path, now, {name: taken[name] for name in taken.keys() - now.keys()}).wait()
        assert written.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert written.size == path.stat().st_size
        read = load_file(path)
        assert read.keys() == taken.keys()
        assert all(torch.equal(read[name], taken[name]) and read[name].dtype == taken[name].dtype for name in taken)


def test_what_follows_the_copy_does_not_reach_the_file(tmp_path: Path) -> None:
    buffer, weights = torch.arange(7), torch.arange(1000.0)
    writing = Snapshot().write(tmp_path / "file", {"buffer": buffer}, {"weights": weights})
    buffer.mul_(0)
    writing.wait_until_copied()
    weights.mul_(0)
    writing.wait()
    read = load_file(tmp_path / "file")
    assert torch.equal(read["weights"], torch.arange(1000.0)) and torch.equal(read["buffer"], torch.arange(7))


def test_what_cannot_be_copied_is_told(tmp_path: Path) -> None:
    writing = Snapshot().write(tmp_path / "file", {}, {"no numbers": torch.empty(3, device="meta")})
    with pytest.raises(CheckpointError, match=r"it could not be copied \(.*meta tensor"):
        writing.wait()
    assert not (tmp_path / "file").exists()


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file or directory: '.*/absent/file'"):
        Snapshot().write(tmp_path / "absent" / "file", {"one": torch.ones(3)}, {}).wait()


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Writing]:
    """A process that writes into a pipe, which nobody reads yet."""
    os.mkfifo(tmp_path / "pipe")
    yield Snapshot().write(tmp_path / "pipe", {}, {"ones": torch.ones(50_000)})
    for process in children("file_writer"):
        process.kill()


def test_a_writer_that_is_killed_is_told(writing: Writing) -> None:
    assert not writing.is_over
    (writer,) = children("file_writer")
    writer.kill()
    with pytest.raises(CheckpointError, match="the process that writes it ended with SIGKILL"):
        writing.wait()
    assert writing.is_over


def test_signals_that_ask_a_rank_to_stop_do_not_stop_its_writer(writing: Writing, tmp_path: Path) -> None:
    (writer,) = children("file_writer")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        writer.send_signal(number)
    assert len((tmp_path / "pipe").read_bytes()) == writing.size > 200_000
    with pytest.raises(CheckpointError, match="Invalid argument"):  # a pipe has no disk
        writing.wait()


def test_a_writer_dies_with_its_rank(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    rank = os.fork()
    if not rank:
        snapshot = Snapshot()
        snapshot.write(tmp_path / "pipe", {"one": torch.ones(3)}, {})
        signal.pause()
    while not (writers := psutil.Process(rank).children()):
        pass
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    assert psutil.wait_procs(writers, timeout=60)[1] == []
