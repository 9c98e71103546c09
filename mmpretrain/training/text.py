"""The tokenizer of a run: the one that the config names, or one trained from the texts it reads, in the run folder.

Enter: a RunConfig. Leave: where the tokenizer lies and what a text tower must know of it; None for runs without text.
"""

from data_pipeline.tokenizer import load_tokenizer, tokenizer_facts, train_tokenizer
from mmpretrain.config import RunConfig
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.modalities.text import TextCodecConfig
from mmpretrain.training.ranks import on_main
from mmpretrain.training.run_folder import RunFolder


def prepare_tokenizer(config: RunConfig, folder: RunFolder) -> tuple[str | None, TokenizerFacts | None]:
    """Folder or hub name of the tokenizer, and its facts. Communicates."""
    if "text" not in config.data.codecs:
        return None, None
    name = on_main(lambda: _choose(config, folder))
    return name, on_main(lambda: tokenizer_facts(load_tokenizer(name)))


def _choose(config: RunConfig, folder: RunFolder) -> str:
    settings = config.data.tokenizer
    if settings.path is not None:
        return settings.path
    if not folder.tokenizer.exists():
        shards = [pattern for source in config.data.train.sources.values() for pattern in source.shards]
        train_tokenizer(shards, settings.train_vocab_size, folder.tokenizer, _keys(config))
    return str(folder.tokenizer)


def _keys(config: RunConfig) -> tuple[str | None, ...]:
    """Where the texts of the run stand in its samples."""
    codecs = (codec for _, codec in sorted(config.data.codecs.items()))
    return tuple(codec.key for codec in codecs if isinstance(codec, TextCodecConfig))
