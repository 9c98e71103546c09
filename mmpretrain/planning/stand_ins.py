"""Stand-ins for what a run has and a plan lacks: the tokenizer that will be trained, and the other ranks.

Enter: a run config. Leave: its model config with a vocabulary, and a process group in which nothing is sent. Refused: a
model whose architecture is named and not on this machine.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from data_pipeline.tokenizer import tokenizer_facts
from mmpretrain.config import RunConfig
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.models.config import ModelConfig, resolve

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
