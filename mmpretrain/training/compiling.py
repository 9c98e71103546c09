"""Transformer blocks compiled one by one, into a cache that outlives the process.

Enter: a model on its device. Leave: its own blocks compiled for each shape they meet; all others as they were.
Refused: a machine without the compilers that this needs.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from mmpretrain.core.errors import ClusterError
from mmpretrain.layers import products
from mmpretrain.layers.blocks import CheckpointedBlock

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_SHAPES = 64
"""Shapes that one kind of block may be compiled for: lengths of trimmed texts, widths of towers, masks or none."""


def compile_blocks(model: nn.Module, cache: Path | None, device: torch.device) -> int:
    """Compile every block that is ours when it first runs, with static shapes; returns how many. Blocks of one shape
    share one graph. `cache` is a folder for what was compiled; None: PyTorch's own choice, or the environment's."""
    _check_compiler(device)
    if cache is not None:
        os.environ[_CACHE] = str(cache)
    import torch._dynamo  # a second, which only a run that compiles pays

    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    torch._dynamo.assume_constant_result(products.has_bf16_products)  # type: ignore[no-untyped-call]
    blocks = [module for module in model.modules() if isinstance(module, CheckpointedBlock) and module.is_one]
    for block in blocks:
        block.run = torch.compile(block.run, dynamic=False, fullgraph=True)  # type: ignore[method-assign]
    return len(blocks)


def _check_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ClusterError(
            f"engine.compile needs a C++ compiler and this machine has no {compiler}; install one, name another in the "
            f"environment variable CXX, or set engine.compile to false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ClusterError("engine.compile needs triton on a GPU; install it, or set engine.compile to false")
