"""Joining the process group that torchrun describes, or a group of one, and choosing this rank's device."""

import datetime
import os
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from mmpretrain.core.collectives import gather_objects, rank
from mmpretrain.core.errors import ClusterError, MMPretrainError
from mmpretrain.core.ranks import World, world_from_env

ResultT = TypeVar("ResultT")


def join(timeout_s: float = 1800.0) -> tuple[World, torch.device]:
    """Make the process group (NCCL on CUDA, gloo otherwise) and return this rank's place and device. Communicates."""
    world = world_from_env()
    device = _device(world)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        if world.size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    return world, device


def leave() -> None:
    """Destroy the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU where there is none; called before its first import, it warns of nothing."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _device(world: World) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ClusterError(
            f"local rank {world.local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            f"launch with --nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def on_main(action: Callable[[], ResultT]) -> ResultT:
    """Run `action` on the main rank and give its result, or raise its error, on every rank. Communicates."""
    outcome: ResultT | MMPretrainError | None = None
    if rank() == 0:
        try:
            outcome = action()
        except MMPretrainError as error:
            outcome = error
    shared = gather_objects(outcome)[0]
    if isinstance(shared, MMPretrainError):
        raise shared
    return cast(ResultT, shared)


def first_on_main(action: Callable[[], ResultT]) -> ResultT:
    """Run on the main rank, then on the others, which find what it left on disk (indexes, downloads). Communicates."""
    mine: list[ResultT] = []
    on_main(lambda: mine.append(action()))
    return mine[0] if mine else action()
