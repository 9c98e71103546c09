"""The tokenizer of a run: the one that the config names, its parent's, or one trained from the texts it reads; the
latter two are kept in the run folder.

Enter: a RunConfig. Leave: where the tokenizer lies and what a text tower must know of it; None for runs without text.
Refused: a named tokenizer that gives words other numbers than the parent's.
"""

import shutil

from data_pipeline.tokenizer import tokenizer_facts, train_tokenizer
from mmpretrain.config import RunConfig
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.core.run_files import saved_checkpoints
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.modalities.text import TextCodecConfig
from mmpretrain.models.parent import Parent
from mmpretrain.training.ranks import on_main
from mmpretrain.training.run_folder import RunFolder


def prepare_tokenizer(
    config: RunConfig, folder: RunFolder, parent: Parent | None = None
) -> tuple[str | None, TokenizerFacts | None]:
    """Folder or hub name of the tokenizer, and its facts. Communicates."""
    if "text" not in config.data.codecs:
        return None, None
    inherited = parent.tokenizer if parent is not None and "text" in parent.towers else None
    name = on_main(lambda: _choose(config, folder, inherited))
    return name, on_main(lambda: tokenizer_facts(load_tokenizer(name)))


def _choose(config: RunConfig, folder: RunFolder, inherited: str | None) -> str:
    settings = config.data.tokenizer
    if settings.path is not None:
        if inherited is not None:
            _check_alike(settings.path, inherited)
        return settings.path
    if inherited is not None:
        load_tokenizer(inherited).save_pretrained(folder.tokenizer)
    elif not (folder.tokenizer.exists() and saved_checkpoints(folder.checkpoints)):
        shutil.rmtree(folder.tokenizer, ignore_errors=True)  # no weights know its words; the config may be another
        shards = [pattern for source in config.data.train.sources.values() for pattern in source.shards]
        train_tokenizer(shards, settings.train_vocab_size, folder.tokenizer, _keys(config), cache=config.data.cache)
    return str(folder.tokenizer)


def _keys(config: RunConfig) -> tuple[str | None, ...]:
    """Where the texts of the run stand in its samples."""
    codecs = (codec for _, codec in sorted(config.data.codecs.items()))
    return tuple(codec.key for codec in codecs if isinstance(codec, TextCodecConfig))


def _check_alike(named: str, inherited: str) -> None:
    """The parent's word vectors mean nothing under other numbers."""
    if load_tokenizer(named).get_vocab() != load_tokenizer(inherited).get_vocab():
        raise ConfigError(
            f"data.tokenizer.path {named} numbers words in another way than {inherited}, by which the parent's text "
            f"tower was trained; leave data.tokenizer.path out to take that one over"
        )
