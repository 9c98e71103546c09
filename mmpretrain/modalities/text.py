"""Text: captions become ids of words in a worker, ids become tokens on the device.

Enter: caption members, then int64 ids [B, L]. Leave: tokens [B, L, D], and scores of hidden states against the word
vectors. Refused: samples without a caption; a vocabulary smaller than the tokenizer's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Self

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from mmpretrain.core.captions import CAPTION_EXTENSIONS, METADATA_EXTENSION, texts_of
from mmpretrain.core.errors import AbsentError, ConfigError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.core.types import Array, FieldSpec, TokenizerFacts
from mmpretrain.layers.initialization import TEXT_POSITION_STD
from mmpretrain.layers.parameters import LearnedPositions, WordEmbedding
from mmpretrain.modalities.base import CodecConfig, StemConfig, WordStem, with_presence


class EmbeddingsStemConfig(StemConfig):
    """Word vectors and learned positions. What is null comes from the tokenizer."""

    kind: Literal["embeddings"] = "embeddings"
    context_length: int = Field(77, gt=0)
    """Tokens per text, padding included."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the word matrix; null: the tokenizer's."""
    eos_id: int | None = None
    """Id of the token that ends a text (pooling: eos); null: the tokenizer's."""
    mask_id: int | None = None
    """Id of the mask token of masked language modelling; null: the tokenizer's."""
    special_ids: tuple[int, ...] | None = None
    """Ids that are never masked nor predicted; null: the tokenizer's."""

    @property
    def modality(self) -> str:
        return "text"

    @property
    def input_field(self) -> FieldSpec:
        return FieldSpec((self.context_length,), "int64")

    def with_tokenizer(self, facts: TokenizerFacts) -> Self:
        if self.vocab_size is not None and self.vocab_size < facts.vocab_size:
            raise ConfigError(
                f"vocab_size {self.vocab_size} of the text stem is smaller than the tokenizer's {facts.vocab_size}; "
                "leave vocab_size out to take the tokenizer's"
            )
        asked = self.model_dump(exclude_none=True)
        found = {
            "vocab_size": facts.vocab_size,
            "eos_id": facts.eos_id,
            "mask_id": facts.mask_id,
            "special_ids": facts.special_ids,
        }
        return type(self).model_validate(found | asked)

    def build(self, width: int) -> "EmbeddingsStem":
        return EmbeddingsStem(self, width)


class EmbeddingsStem(WordStem):
    """A table of word vectors plus a table of positions."""

    def __init__(self, config: EmbeddingsStemConfig, width: int) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError(
                "the text stem has no vocab_size and was given no tokenizer; set vocab_size, or resolve the model "
                "config with the tokenizer first"
            )
        self.num_tokens = config.context_length
        self.vocab_size = config.vocab_size
        self.eos_id, self.mask_id = config.eos_id, config.mask_id
        self.special_ids = config.special_ids or ()
        self.words = WordEmbedding(config.vocab_size, width)
        self.positions = LearnedPositions(config.context_length, width, std=TEXT_POSITION_STD)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.positions(self.words(inputs))
        return tokens

    def score(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.words(hidden, score=True)
        return logits


class TextCodecConfig(CodecConfig):
    """How texts become ids; the length comes from the tower that reads them."""

    kind: Literal["text"] = "text"
    field: str = Field("text", min_length=1)
    """Batch field it fills; the codec stands under this name."""
    key: str | None = Field(None, min_length=1)
    """Key in the .json member under which the text stands, or a list of texts; null: the sample's captions."""
    caption: Literal["random", "first"] = "random"
    """Which text of a sample that has several is used in training; evaluation sees them all."""

    @property
    def makes(self) -> str:
        return self.field

    def fields(self, inputs: Mapping[str, FieldSpec]) -> Mapping[str, FieldSpec]:
        return with_presence(self.field, _ids_and_mask(self.field, *inputs[self.field].shape))

    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> "TextCodec":
        if tokenizer is None:
            raise ConfigError("the text codec needs a tokenizer; set data.tokenizer.path to a folder or a hub name")
        (length,) = inputs[self.field].shape
        return TextCodec(_fixed_length(tokenizer, length), length, self.caption, self.field, self.key)


@dataclass(frozen=True)
class TextCodec:
    """Picks a text and encodes it as the tokenizer does, specials included, cut and padded to a fixed length."""

    tokenizer: Tokenizer
    """The Rust tokenizer alone: it travels to workers, which then need not import transformers."""
    length: int
    caption: Literal["random", "first"]
    field: str = "text"
    key: str | None = None

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return _ids_and_mask(self.field, self.length)

    @property
    def extensions(self) -> frozenset[str]:
        return CAPTION_EXTENSIONS if self.key is None else frozenset({METADATA_EXTENSION})

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        captions = self.captions(members)
        if not captions:
            what = "caption" if self.key is None else f"text under {self.key!r} in .json"
            raise AbsentError(f"no {what} (saw: {', '.join(members)})")
        pick = int(draw.integers(len(captions))) if draw is not None and self.caption == "random" else 0
        ids, mask = _encoded(self.tokenizer, captions[pick])
        return {self.field: ids, f"{self.field}.mask": mask}

    def captions(self, members: Mapping[str, bytes]) -> list[str]:
        """All texts of a sample."""
        return texts_of(members, self.key)

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        """The batch fields of these texts, stacked: {"text": int64 [n, L], "text.mask": bool [n, L]}."""
        encoded = self.tokenizer.encode_batch(list(texts))
        ids = np.array([text.ids for text in encoded], np.int64).reshape(-1, self.length)
        mask = np.array([text.attention_mask for text in encoded], np.bool_).reshape(-1, self.length)
        return {self.field: ids, f"{self.field}.mask": mask}


@lru_cache(4096)
def _encoded(tokenizer: Tokenizer, text: str) -> tuple[Array, Array]:
    """Ids and mask of one text, [L] each and not to be changed: questions, tags and templates come again and again."""
    encoded = tokenizer.encode(text)
    return np.array(encoded.ids, np.int64), np.array(encoded.attention_mask, np.bool_)


def _ids_and_mask(field: str, length: int) -> Mapping[str, FieldSpec]:
    return {field: FieldSpec((length,), "int64"), f"{field}.mask": FieldSpec((length,), "bool")}


def _fixed_length(name: str, length: int) -> Tokenizer:
    """The fast tokenizer of a local folder or hub name, set to cut and pad on the right to `length`."""
    loaded = load_tokenizer(name)
    tokenizer = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if length <= special:
        raise ConfigError(f"context_length {length} leaves no room for words beside {special} special tokens")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return tokenizer
