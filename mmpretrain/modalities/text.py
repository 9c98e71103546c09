"""Text: ids of words become tokens on the device.

Enter: int64 ids [B, L]. Leave: tokens [B, L, D], and scores of hidden states against the word vectors. Refused: a
vocabulary smaller than the tokenizer's.
"""

from typing import Literal, Self

from pydantic import Field
from torch import Tensor

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TokenizerFacts
from mmpretrain.layers.initialization import TEXT_POSITION_STD
from mmpretrain.layers.parameters import LearnedPositions, WordEmbedding
from mmpretrain.modalities.base import StemConfig, WordStem


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
