"""What a modality offers: a codec (bytes side) and stems (tensor side), each made from its config class.

Enter: tar members. Leave: fixed-shape arrays (codec), then tokens of the tower's width (stem).
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from mmpretrain.core.config import Config
from mmpretrain.core.registry import kind_of
from mmpretrain.core.types import Codec, FieldSpec, TokenizerFacts


class Stem(nn.Module):
    """Turns one modality's inputs into content tokens with positions; shape legend: B rows, L tokens, D width."""

    num_tokens: int
    """L, fixed for the tower (static shapes)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs [B, ...] as the batch holds them (uint8 pixels, int64 ids) to tokens [B, L, D]."""
        raise NotImplementedError

    def token_mask(self, mask: Tensor) -> Tensor:
        """Map the mask of the inputs as the batch holds it to that of the tokens, bool [B, L]."""
        return mask


class PatchStem(Stem):
    """A stem that cuts its inputs into equal patches."""

    patch_shape: tuple[int, ...]
    """Channels and sizes of one patch, e.g. (3, 16, 16)."""
    grid: tuple[int, ...]
    """Patches along each axis, e.g. (14, 14); tokens run fastest along the last."""

    def patchify(self, inputs: Tensor) -> Tensor:
        """The normalised inputs as patches in the order of the tokens, fp32: [B, L, prod(patch_shape)]."""
        raise NotImplementedError


class WordStem(Stem):
    """A stem that looks up word vectors."""

    vocab_size: int
    eos_id: int | None
    mask_id: int | None
    special_ids: tuple[int, ...]

    def score(self, hidden: Tensor) -> Tensor:
        """Score hidden states [N, D] against the word vectors: [N, vocab]."""
        raise NotImplementedError


class StemConfig(Config):
    """Config of a stem; subclasses add `kind: Literal[...]` and the modality they serve."""

    @property
    @abstractmethod
    def modality(self) -> str:
        """Batch field the stem reads: "image", "text", ..."""

    @property
    @abstractmethod
    def input_field(self) -> FieldSpec:
        """Shape and dtype of one input row: what the codec must produce."""

    def with_tokenizer(self, facts: TokenizerFacts) -> Self:
        """This config with what it left to the tokenizer filled in; stems without words return themselves."""
        return self

    @abstractmethod
    def build(self, width: int) -> Stem:
        """A freshly initialised stem that emits tokens of `width`."""


class CodecConfig(Config):
    """Config of a codec; subclasses add `kind: Literal["<modality>"]`.

    Sizes are not repeated here: they come from the model's towers as `input_field`, for labels from the objectives.
    """

    @property
    def makes(self) -> str:
        """The batch field it makes, under whose name it stands in data.codecs."""
        return kind_of(type(self))

    @abstractmethod
    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> Codec:
        """A codec that produces the fields of `inputs` for its modality; `tokenizer`: a local folder or hub name."""
