"""What every fusion is: tokens of several modalities in, tokens that know of each other and one pooled vector out."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from mmpretrain.core.config import Config
from mmpretrain.core.types import TensorDict


class Fusion(nn.Module):
    """Joins modalities. Shape legend: B rows, L_m tokens of modality m, D fusion width."""

    width: int
    """D of everything that leaves."""
    reads: ClassVar[Literal["tokens", "pooled"]] = "tokens"
    """What enters for each modality: all its tokens, or its pooled vector as the one token (L_m = 1)."""

    def forward(self, tokens: TensorDict, masks: Mapping[str, Tensor | None]) -> TensorDict:
        """Map {m: [B, L_m, D_m]} and {m: bool [B, L_m] or None} to {m: [B, L_m, D], "pooled": [B, D]}.

        Modalities may be any non-empty subset of those the fusion was built for; masks are True where a token counts.
        A modality that a row lacks has no token that counts, and what stands there reaches nothing else of that row.
        A fusion whose config does not give tokens returns "pooled" alone.
        """
        raise NotImplementedError


class FusionConfig(Config):
    """Config of a fusion; subclasses add `kind: Literal[...]`."""

    @property
    def gives_tokens(self) -> bool:
        """Whether tokens leave as they entered, in the same places, knowing of the other modalities."""
        return True

    @property
    def gives_pooled(self) -> bool:
        """Whether one vector of all modalities leaves."""
        return True

    @abstractmethod
    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        """A fusion over towers of these widths; None for late fusion, where only embeddings meet."""


class BlocksFusionConfig(FusionConfig):
    """Config of a fusion by transformer blocks."""

    width: int = Field(768, gt=0)
    """Width of the fused tokens; towers of another width are projected."""
    heads: int = Field(12, gt=0)
    """Attention heads; they divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the MLPs over the width."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self
