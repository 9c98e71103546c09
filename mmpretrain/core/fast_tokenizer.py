"""A fast tokenizer of transformers, from a folder that a stranger may have filled, or from the hub.

Enter: a local folder or hub name. Leave: the tokenizer. Refused, as a ConfigError: what is missing or garbage, needs
code of its own, which is never run, has no fast version, or no pad token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmpretrain.core.errors import ConfigError

MAX_WORDS = 1 << 24
"""Far more than any tokenizer has; the library takes memory for as many as the largest number says."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(name: str | Path, local_only: bool = False) -> PreTrainedTokenizerFast:
    """A local folder's or the hub's fast tokenizer; code of its own is never run. `local_only`: nothing is fetched."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import; workers do without

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
    except Exception as error:  # of garbage the Rust library raises just that
        raise ConfigError(
            f"tokenizer {str(name)!r} cannot be loaded ({_first_line(error)}); give a folder that holds a "
            f"tokenizer.json or a hub name, or leave data.tokenizer.path null to train one"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer {str(name)!r} has no fast (Rust) version, which is needed; choose one that has")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"tokenizer {str(name)!r} has no pad token, which texts of a fixed length need; add one")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MAX_WORDS:
        raise ConfigError(f"tokenizer {str(name)!r} gives a word the number {largest}, beyond {MAX_WORDS} words")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
