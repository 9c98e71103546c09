"""What a modality offers: a codec (bytes side) and stems (tensor side), each made from its config class.

Enter: tar members. Leave: fixed-shape arrays (codec), then tokens of the tower's width (stem). Refused: a sample whose
member is broken, and, where the modality is required, one that has none.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from mmpretrain.core.config import Config
from mmpretrain.core.errors import AbsentError
from mmpretrain.core.registry import kind_of
from mmpretrain.core.types import Array, FieldSpec, TokenizerFacts


class Stem(nn.Module):
    """Turns one modality's inputs into content tokens with positions; shape legend: B rows, L tokens, D width."""

    num_tokens: int
    """L, fixed for the tower (static shapes)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs [B, ...] as the batch holds them (uint8 pixels, int64 ids) to tokens [B, L, D]."""
        raise NotImplementedError

    @property
    def tokens_now(self) -> int:
        """L in the step at hand, of a stem whose inputs are smaller at first."""
        return self.num_tokens

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

    @property
    def last_phase(self) -> int:
        """Step from which on nothing about the inputs changes any more."""
        return 0

    def with_tokenizer(self, facts: TokenizerFacts) -> Self:
        """This config with what it left to the tokenizer filled in; stems without words return themselves."""
        return self

    @abstractmethod
    def build(self, width: int) -> Stem:
        """A freshly initialised stem that emits tokens of `width`."""


class Decoder(Protocol):
    """What is particular to a modality in a codec: samples that have it become arrays."""

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """What `decode` returns, "<modality>.present" not among it."""
        ...

    @property
    def extensions(self) -> frozenset[str]:
        """Member extensions it reads."""
        ...

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        """Decode one sample; raises AbsentError where it has none of the modality, SampleError where that is broken."""
        ...


class CodecConfig(Config):
    """Config of a codec; subclasses add `kind: Literal["<modality>"]`.

    Sizes are not repeated here: they come from the model's towers as `input_field`, for labels from the objectives.
    """

    missing: Literal["refuse", "weightless"] = "refuse"
    """refuse: a sample that lacks it is unusable; weightless: it stays, and what needs the modality or label skips it.
    What is there and broken makes a sample unusable either way."""
    drop: float = Field(0.0, ge=0, lt=1)
    """Share of the samples that are made to lack it in training, each anew whenever it is drawn (modality dropout)."""
    keep: bool = False
    """Decode each sample once, as evaluation does (without augmentation), and keep the result in the memory of every
    process that decodes: for sets that are small and seen many times."""

    @property
    def makes(self) -> str:
        """The batch field it makes, under whose name it stands in data.codecs."""
        return kind_of(type(self))

    @abstractmethod
    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> Decoder:
        """What decodes the fields of `inputs` for its modality; `tokenizer`: a local folder or hub name."""

    def fields(self, inputs: Mapping[str, FieldSpec]) -> Mapping[str, FieldSpec]:
        """What its codec makes, told without the tokenizer."""
        return self.codec(inputs, None).fields

    def codec(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> "PresenceCodec":
        """`build`, for samples with the modality and without."""
        decoder = self.build(inputs, tokenizer)
        return PresenceCodec(self.makes, decoder, self.missing == "refuse", self.drop, {} if self.keep else None)


def with_presence(modality: str, fields: Mapping[str, FieldSpec]) -> Mapping[str, FieldSpec]:
    """The fields of a decoder, and the one that tells which rows have the modality."""
    return {**fields, f"{modality}.present": FieldSpec((), "bool")}


@dataclass(frozen=True)
class PresenceCodec:
    """The codec of every modality: tells which samples have it, and fills with zeros the rows of those that do not."""

    modality: str
    decoder: Decoder
    required: bool
    drop: float
    kept: dict[bytes, dict[str, Array]] | None = field(default=None, compare=False, repr=False)
    """Digest of the members it reads -> what they hold; None: nothing is kept."""

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return with_presence(self.modality, self.decoder.fields)

    @property
    def extensions(self) -> frozenset[str]:
        return self.decoder.extensions

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        found = self._decoded(members, draw)
        present = found is not None and not self._drops(draw)
        arrays = found if found is not None and present else self._zeros()
        return {**arrays, f"{self.modality}.present": np.array(present)}

    def _decoded(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array] | None:
        try:
            return self.decoder.decode(members, draw) if self.kept is None else self._from_memory(members, self.kept)
        except AbsentError:
            if self.required:
                raise
            return None

    def _from_memory(self, members: Mapping[str, bytes], kept: dict[bytes, dict[str, Array]]) -> dict[str, Array]:
        """What was decoded of the same bytes before; samples may share a name, so their content is what counts."""
        digest = hashlib.blake2b(digest_size=16)
        for extension in sorted(self.extensions & members.keys()):
            digest.update(f"{extension} {len(members[extension])} ".encode())
            digest.update(members[extension])
        key = digest.digest()
        if key not in kept:
            kept[key] = self.decoder.decode(members, None)
        return kept[key]

    def _drops(self, draw: np.random.Generator | None) -> bool:
        """Drawn after decoding, so that augmentation is the same with and without dropout."""
        return draw is not None and self.drop > 0 and draw.random() < self.drop

    def _zeros(self) -> dict[str, Array]:
        return {name: np.zeros(spec.shape, spec.dtype) for name, spec in self.decoder.fields.items()}
