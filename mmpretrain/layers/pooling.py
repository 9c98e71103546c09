"""From tokens to one vector per row.

Shape legend: B rows, L tokens, D width. A mask is bool [B, L], True where a token counts.
"""

import torch
from torch import Tensor, nn

from mmpretrain.layers.attention import CrossAttention
from mmpretrain.layers.blocks import MLP, Activation
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.parameters import LearnedToken


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count, [B, D]; zero for a row where none does."""
    if mask is None:
        return tokens.mean(dim=1)
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def at_first(tokens: Tensor, ids: Tensor, token_id: int) -> Tensor:
    """The token at the first place of each row where ids [B, L] equal `token_id`; the first token where none does."""
    places = (ids == token_id).int().argmax(dim=1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), places]


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, then a residual MLP (the head of SigLIP, Zhai et al. 2023)."""

    def __init__(self, width: int, heads: int, hidden: int, activation: Activation, eps: float) -> None:
        super().__init__()
        scales = BlockScales(width, depth=1)
        self.probe = LearnedToken(width, std=width**-0.5)
        self.attention = CrossAttention(heads, scales)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(scales, hidden, activation)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, L, D] to [B, D]."""
        pooled: Tensor = self.attention(self.probe(tokens.shape[0]), tokens, mask)
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled.squeeze(1)
