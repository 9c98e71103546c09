"""Stand-ins for what a run consists of: a model, a batch and a world, with shapes and no contents.

Enter: a run config. Leave: the run's own model on tensors without storage, a batch as the codecs would make it, and a
process group in which nothing is sent. Refused: a model whose architecture is named and not on this machine.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.tokenizer import tokenizer_facts
from mmpretrain.config import RunConfig
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.trained_parts import prepare
from mmpretrain.training.parts import AUTOCAST

ASSUMED_WORDS = 49_408
"""Vocabulary of a named tokenizer that is not on this machine: CLIP's."""


@dataclass(frozen=True)
class ResolvedModel:
    """The model config with its vocabulary."""

    config: ModelConfig
    guessed: str | None = None
    """The tokenizer whose vocabulary had to be guessed, if one had to."""


def resolve_model(config: RunConfig) -> ResolvedModel:
    """A trained tokenizer has the words of the config; a named one is looked for on this machine alone."""
    name = config.data.tokenizer.path
    if name is None:
        return ResolvedModel(resolve(config.model, _words(config.data.tokenizer.train_vocab_size)))
    try:
        return ResolvedModel(resolve(config.model, tokenizer_facts(load_tokenizer(name, local_only=True))))
    except ConfigError:
        few, more = (resolve(config.model, _words(size)) for size in (8, 9))
        if few == more:  # the model states its vocabulary itself
            return ResolvedModel(few)
        return ResolvedModel(resolve(config.model, _words(ASSUMED_WORDS)), guessed=name)


def _words(size: int) -> TokenizerFacts:
    return TokenizerFacts(size, pad_id=0, eos_id=1, mask_id=2, special_ids=(0, 1, 2))


def build_model(config: RunConfig, model: ModelConfig) -> MultimodalTransformer:
    """The run's model on the meta device, with what learns in it marked."""
    with torch.device("meta"):
        built = MultimodalTransformer.create(model, config.objectives)
        if config.finetune is not None:
            prepare(built, config.finetune)
    built.autocast_dtype = AUTOCAST[config.precision]
    built.train()
    return built


def make_fake(model: nn.Module) -> None:
    """Put fake tensors in place of meta ones; run it under a `FakeTensorMode`. Ties between weights are kept."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
                module._parameters[name] = made.setdefault(id(weight), fake)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def make_batch(fields: dict[str, FieldSpec], rows: int) -> TensorDict:
    """A micro-batch as the loader makes it; run it under a `FakeTensorMode`."""
    facts = {name: FieldSpec((), "int64") for name in ("position", "draw", "sample")}
    return {
        name: torch.empty((rows, *spec.shape), dtype=getattr(torch, spec.dtype))
        for name, spec in (fields | facts).items()
    }


@contextmanager
def pretended_world(ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of so many, whose collectives send nothing and return what was there before."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside of a run"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
            yield
    finally:
        dist.destroy_process_group()
