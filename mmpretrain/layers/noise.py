"""Random numbers on the device as a pure function of each row's key: equal for any device and batch split.

A counter-based generator: the 32-bit finaliser of MurmurHash3 (Appleby) over (row key, column, stream), in int64 tensor
arithmetic, so that no generator state exists to save or to shift.
"""

import zlib

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _mix32(value: Tensor) -> Tensor:
    value = (value ^ (value >> 16)) * 0x85EBCA6B & _MASK32
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & _MASK32
    return value ^ (value >> 16)


def uniform(draw: Tensor, n: int, stream: str, first: int = 0) -> Tensor:
    """Map row keys, int64 [B], to fp32 [B, n] in [0, 1); different `stream` names are independent.

    These are the columns from `first` on, so that wide rows can be made in parts."""
    low, high = draw & _MASK32, (draw >> 32) & _MASK32
    key = _mix32(_mix32(low ^ zlib.crc32(stream.encode())) ^ high)
    columns = torch.arange(first, first + n, device=draw.device, dtype=torch.int64) * 0x9E3779B1 & _MASK32
    bits = _mix32(_mix32(key[:, None] ^ columns[None, :]) + 0x7F4A7C15 & _MASK32)
    return (bits >> 8).to(torch.float32) * 2.0**-24


def keep_lowest(noise: Tensor, k: int) -> Tensor:
    """Column indices, int64 [B, k] in rising order, of the k lowest of each row of noise [B, n]."""
    return noise.argsort(dim=1, stable=True)[:, :k].sort(dim=1).values
