"""What objectives that hide patches of a tower share: the masking, what the tower says of the rest, the decoder.

Enter: a chunk's encoder. Leave: predictions at the hidden patches. Refuses towers without patches, and shares that hide
none or all. Legend: B rows, L patches, K visible ones, M = L - K hidden ones, D decoder width, P prefix tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.registry import kind_of
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.blocks import Transformer
from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.pair_tiles import full_precision
from mmpretrain.layers.parameters import LearnedToken
from mmpretrain.layers.patch_masking import Layout, PatchMasking, Split
from mmpretrain.layers.positions import SinCosPositions
from mmpretrain.objectives.base import Encoder, ModelFacts, Objective, TowerFacts
from mmpretrain.objectives.conditions import ConditionedConfig, rows_with, tokens_in_sight


class PatchDecoder(nn.Module):
    """From tokens of the visible patches to a prediction at each hidden one."""

    def __init__(self, config: HiddenPatchesConfig, tower: TowerFacts, in_width: int, out_width: int) -> None:
        super().__init__()
        width = config.decoder_width
        assert tower.patch_grid is not None, "a tower without patches is refused before"
        self.num_prefix = tower.num_prefix
        self.embed = Linear(in_width, width, std=in_width**-0.5)
        self.mask_token = LearnedToken(width, std=0.02)
        self.positions = SinCosPositions(tower.patch_grid, width)
        self.transformer = Transformer(width, config.decoder_depth, config.decoder_heads)
        self.norm = nn.LayerNorm(width)
        self.predict = Linear(width, out_width, std=width**-0.5)

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Map tokens [B, P + K, D'] to predictions [B, M, out width]."""
        seen = self.embed(tokens)
        prefix, patches = seen[:, : self.num_prefix], seen[:, self.num_prefix :]
        num_patches = visible.shape[1] + hidden.shape[1]
        canvas = self.mask_token(patches.shape[0]).expand(-1, num_patches, -1).to(patches.dtype)
        canvas = self.positions(canvas.scatter(1, _wide(visible, patches), patches))
        decoded = self.transformer(torch.cat([prefix.to(canvas.dtype), canvas], dim=1))[:, self.num_prefix :]
        predicted: Tensor = self.predict(self.norm(at_patches(decoded, hidden)))
        return predicted


def at_patches(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Of tokens [B, L, D] those of the patches `numbers`, int64 [B, N]: [B, N, D]."""
    return tokens.gather(1, _wide(numbers, tokens))


def _wide(numbers: Tensor, like: Tensor) -> Tensor:
    """Repeat int64 [B, N] along the width of `like` [B, *, D], as gather and scatter want it."""
    return numbers[:, :, None].expand(-1, -1, like.shape[-1])


class HiddenPatches(Objective):
    """Predict something of the patches a tower did not see, alone or with other modalities in sight."""

    def __init__(self, config: HiddenPatchesConfig, facts: ModelFacts, out_width: int) -> None:
        super().__init__()
        tower = facts.towers[config.modality]
        in_width = facts.fusion_width if config.condition_on else tower.width
        assert in_width is not None, "the model config refuses an objective whose fused tokens are not there"
        self.modality, self.condition_on = config.modality, config.condition_on
        self.masking = config.masking_of(tower)
        self.decoder = PatchDecoder(config, tower, in_width, out_width)

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.condition_on

    def count(self, batch: TensorDict) -> Tensor:
        return self.present(batch).sum().float() * (self.masking.num_patches - self.masking.num_visible)

    def present(self, batch: TensorDict) -> Tensor:
        """bool [B]: rows with the modality and all that is to be in sight."""
        return rows_with(batch, (self.modality, *self.condition_on))

    def predict(self, encoder: Encoder, split: Split) -> Tensor:
        """fp32 [B, M, out width], from the visible patches and the other modalities."""
        output = encoder.tower(self.modality, keep=split.visible)
        tokens = tokens_in_sight(encoder, self.modality, output, self.condition_on)
        return full_precision(self.decoder(tokens, split.visible, split.hidden))


class HiddenPatchesConfig(ConditionedConfig):
    """Config of an objective that hides patches of an image, a spectrogram or a video."""

    modality: str = "image"
    """The modality whose patches are hidden."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that are hidden."""
    masking: Layout = "random"
    """random: each patch by itself; tube: the same random places at all times, for video with mask_ratio 0.9; block:
    places in rectangles, the same at all times."""
    decoder_width: int = Field(default=512, gt=0, multiple_of=4)
    """Width of the decoder, a multiple of 4 for its fixed positions (of 16 for video)."""
    decoder_depth: int = Field(default=8, gt=0)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, gt=0)
    """Attention heads of the decoder."""

    @property
    def fixed_grids(self) -> tuple[str, ...]:
        return (self.modality,)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> HiddenPatchesConfig:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width {self.decoder_width} is not a multiple of decoder_heads {self.decoder_heads}; choose "
                "heads that divide the width"
            )
        return self

    def masking_of(self, tower: TowerFacts) -> PatchMasking:
        """The masking over a tower's patches."""
        kind = kind_of(type(self))
        if tower.patch_grid is None:
            raise ConfigError(
                f"{kind} hides patches of a grid, but tower {self.modality!r} has none; use a native tower with a "
                "patch stem"
            )
        stream = ".".join((kind, self.modality, *self.condition_on))
        masking = PatchMasking(self.masking, tower.patch_grid, self.mask_ratio, stream)
        if not 0 < masking.num_visible < masking.num_patches:
            raise ConfigError(
                f"{kind} with mask_ratio {self.mask_ratio} would show {masking.num_visible} of {masking.num_patches} "
                "patches; choose a ratio that hides some and shows some"
            )
        return masking
