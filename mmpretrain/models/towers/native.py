"""The native tower: a stem, pre-norm transformer blocks, and a pooled vector.

Its options span CLIP's and SigLIP's image and text towers, the ViT of MAE and a BERT-like encoder. Legend as in
`models/towers/base.py`. Refused: a stem of another modality, heads that do not divide the width, pooling without the
token it needs.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.registry import union_of
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.blocks import Activation, Transformer
from mmpretrain.layers.padding import filled_columns
from mmpretrain.layers.parameters import ClassToken
from mmpretrain.layers.patch_dropout import DropSchedule, PatchDropout
from mmpretrain.layers.pooling import AttentionPool, at_first, masked_mean
from mmpretrain.modalities.base import PatchStem, Stem, StemConfig, WordStem
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.objectives.base import TowerFacts

if TYPE_CHECKING:
    StemUnion = StemConfig
else:
    StemUnion = union_of("mmpretrain.modalities", StemConfig)

Pooling = Literal["class", "mean", "eos", "last", "map"]


class NativeTowerConfig(TowerConfig):
    """A transformer of our own over the tokens of a stem."""

    kind: Literal["native"] = "native"
    stem: StemUnion
    """How inputs become tokens."""
    width: int = Field(768, gt=0)
    """Width of the tokens."""
    depth: int = Field(12, gt=0)
    """Number of blocks."""
    heads: int = Field(12, gt=0)
    """Attention heads; they divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLPs over the width."""
    pooling: Pooling = "mean"
    """class: a class token is put first and read; mean: over the tokens that count; eos: at the first end-of-text id;
    last: the last position; map: SigLIP's attention pool."""
    causal: bool = False
    """Each token sees only earlier ones (CLIP's text tower)."""
    attend_padding: bool = False
    """Padding counts as tokens, as in SigLIP's text tower."""
    pre_norm: bool = False
    """Normalise the tokens before the first block (CLIP's image tower)."""
    activation: Activation = "gelu"
    """Nonlinearity of the MLPs."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every LayerNorm."""
    patch_dropout: DropSchedule = 0.0
    """Share of the patches left out in training, of each row as many, or phases, which end best with none left out
    (FLIP, arXiv 2212.00794): [{from_step: 0, share: 0.5}, {from_step: 9000, share: 0}]. Evaluation sees all, and an
    objective that hides patches itself hides its own."""

    @property
    def changes_grid(self) -> bool:
        return self.stem.last_phase > 0

    @property
    def last_phase(self) -> int:
        dropout = 0 if isinstance(self.patch_dropout, float) else self.patch_dropout[-1].from_step
        return max(dropout, self.stem.last_phase)

    @model_validator(mode="after")
    def _parts_fit(self) -> "NativeTowerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.pooling == "class" and self.causal:
            raise ValueError("pooling class reads the first token, which sees no other when causal; use eos or mean")
        return self

    def check(self, modality: str) -> None:
        if self.stem.modality != modality:
            raise ValueError(f"tower {modality!r} has a stem for {self.stem.modality!r}; rename the tower or its stem")
        if modality == "text" and self.patch_dropout != 0.0:
            raise ValueError(
                "patch_dropout leaves out patches and a text has none; give it to a tower that has patches"
            )

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        if tokenizer is None:
            return self
        if self.pooling == "eos" and not tokenizer.ends_texts:
            raise ConfigError(
                "pooling eos reads a text where it ends, and the tokenizer puts no such token behind texts; add one to "
                "its post-processor, or set the tower's pooling to mean"
            )
        return self.model_copy(update={"stem": self.stem.with_tokenizer(tokenizer)})

    def input_field(self, modality: str) -> FieldSpec:
        return self.stem.input_field

    def build(self, modality: str) -> "NativeTower":
        return NativeTower(self)


class NativeTower(Tower):
    """Stem, class token, blocks, final norm over all tokens, pooling."""

    def __init__(self, config: NativeTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.pooling = config.pooling
        self.causal = config.causal
        self.masked_keys = not (config.causal or config.attend_padding)
        self.stem = config.stem.build(width)
        self.eos_id = _eos_id(self.stem) if config.pooling == "eos" else None
        pools_padding = config.pooling == "last" or (config.pooling == "map" and config.causal)
        self.sees_padding = config.attend_padding or pools_padding or not isinstance(self.stem, WordStem)
        self.class_token = ClassToken(width) if config.pooling == "class" else None
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.transformer = Transformer(
            width, config.depth, config.heads, config.mlp_ratio, config.causal, config.activation, config.norm_eps
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pool = _attention_pool(config) if config.pooling == "map" else None
        self.patch_dropout = PatchDropout(config.patch_dropout, f"patch_dropout.{config.stem.modality}")

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        tokens, mask = self._embedded(inputs, mask, keep)
        tokens = self.norm(self.transformer(tokens, self._key_mask(mask)))
        outputs = {"tokens": tokens, "pooled": self._pool(tokens, inputs, mask)}
        return outputs if mask is None else outputs | {"mask": mask}

    def columns(self, inputs: Tensor, mask: Tensor) -> int:
        if self.sees_padding:
            return inputs.shape[1]
        pooled = 1 if self.eos_id is None else int((inputs == self.eos_id).int().argmax(dim=1).max()) + 1
        return filled_columns(mask, at_least=pooled)

    def kept_tokens(self, draw: Tensor | None, mask: Tensor | None) -> Tensor | None:
        counts = None if mask is None else self.stem.token_mask(mask)
        kept: Tensor | None = self.patch_dropout(draw, self.stem.tokens_now, counts)
        return kept

    def top_layers(self, inputs: Tensor, mask: Tensor | None, number: int) -> list[Tensor]:
        tokens, mask = self._embedded(inputs, mask, None)
        outputs = list(self.transformer.outputs(tokens, self._key_mask(mask)))
        return [output[:, -self.stem.num_tokens :] for output in outputs[-number:]]

    def _embedded(self, inputs: Tensor, mask: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What enters the blocks, and which of it counts."""
        tokens = self.stem(inputs)
        mask = None if mask is None else self.stem.token_mask(mask)
        if keep is not None:
            tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            mask = None if mask is None else mask.gather(1, keep)
        if self.class_token is not None:
            tokens = self.class_token(tokens)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return self.pre_norm(tokens), mask

    def _key_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask for attention: the first token is always a key, so that a row of padding stays finite."""
        if mask is None or not self.masked_keys:
            return None
        first = torch.zeros_like(mask)
        first[:, 0] = True
        return mask | first

    def _pool(self, tokens: Tensor, inputs: Tensor, mask: Tensor | None) -> Tensor:
        if self.pooling == "class":
            return tokens[:, 0]
        if self.pooling == "last":
            return tokens[:, -1]
        if self.eos_id is not None:
            return at_first(tokens, inputs, self.eos_id)
        if self.pool is not None:
            pooled: Tensor = self.pool(tokens, self._key_mask(mask))
            return pooled
        return masked_mean(tokens, mask)

    def facts(self) -> TowerFacts:
        prefix = 0 if self.class_token is None else 1
        return replace(
            stem_facts(self.stem, self.norm.normalized_shape[0]),
            num_prefix=prefix,
            causal=self.causal,
            num_layers=len(self.transformer.blocks),
        )

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        return self.stem.score(hidden) if isinstance(self.stem, WordStem) else super().vocabulary_logits(hidden)

    def patches(self, inputs: Tensor) -> Tensor:
        return self.stem.patchify(inputs) if isinstance(self.stem, PatchStem) else super().patches(inputs)


def stem_facts(stem: Stem, width: int) -> TowerFacts:
    """What objectives may know of the tokens of a stem."""
    words = stem if isinstance(stem, WordStem) else None
    return TowerFacts(
        width=width,
        num_tokens=stem.num_tokens,
        num_prefix=0,
        vocab_size=words.vocab_size if words else None,
        patch_shape=stem.patch_shape if isinstance(stem, PatchStem) else None,
        patch_grid=stem.grid if isinstance(stem, PatchStem) else None,
        special_ids=words.special_ids if words else (),
        mask_id=words.mask_id if words else None,
    )


def _eos_id(stem: nn.Module) -> int:
    if not isinstance(stem, WordStem) or stem.eos_id is None:
        raise ConfigError(
            "pooling eos needs the id that ends a text; set stem.eos_id or use a tokenizer with an eos token"
        )
    return stem.eos_id


def _attention_pool(config: NativeTowerConfig) -> AttentionPool:
    hidden = int(config.width * config.mlp_ratio)
    return AttentionPool(config.width, config.heads, hidden, config.activation, config.norm_eps)
