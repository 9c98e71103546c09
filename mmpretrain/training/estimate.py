"""How much memory the states of a run take on each rank, from its config alone.

Enter: a RunConfig and a number of ranks. Leave: parameters, and bytes of parameters, gradients and moments; activations
come on top. Refused: nothing; a model of named weights that are not on this machine has no estimate.
"""

from dataclasses import dataclass

import torch

from mmpretrain.config import RunConfig
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.models.config import resolve
from mmpretrain.models.multimodal import MultimodalTransformer

GIB = 2.0**30


@dataclass(frozen=True)
class StateMemory:
    """Of one rank."""

    parameters: int
    bytes_on_gpu: float

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.1f} M parameters, states {self.bytes_on_gpu / GIB:.2f} GiB on each rank"


def state_memory(config: RunConfig, ranks: int) -> StateMemory:
    """fp32 parameters, gradients and the two moments, as the ZeRO stage divides them (arXiv 1910.02054, figure 1)."""
    words = TokenizerFacts(config.data.tokenizer.train_vocab_size, pad_id=0, eos_id=1, mask_id=2)
    with torch.device("meta"):
        model = MultimodalTransformer.create(resolve(config.model, words), config.objectives)
    count = sum(parameter.numel() for parameter in model.parameters())
    shared = [stage <= config.zero_stage for stage in (3, 2, 1)]  # parameters, gradients, moments
    sizes = (4.0, 4.0, 8.0 if config.engine.offload == "none" else 0.0)
    per_parameter = sum(size / ranks if split else size for size, split in zip(sizes, shared, strict=True))
    return StateMemory(count, count * per_parameter)
