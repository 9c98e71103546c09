"""Multi-head attention on `scaled_dot_product_attention`, with one fused projection for what shares an input.

Shape legend: B rows, L queries, K keys, D width, H heads. A key mask is bool [B, K], True where a key counts; None
where no key is padding, which lets SDPA take its fastest kernel.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.layers import products
from mmpretrain.layers.initialization import BlockScales, Linear
from mmpretrain.layers.kernels import kernel_device

LONGEST_BY_MATMUL = 512
"""Keys up to which plain matrix products serve bf16 on a CPU: SDPA's kernel there takes 2 to 4 times as long for a
forward and backward at 32 to 197 tokens (torch 2.15, AVX-512 with AMX), while the logits stay small."""


def _split_heads(joined: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Cut [B, L, parts D] into `parts` views of [B, H, L, D / H]."""
    rows, length, _ = joined.shape
    return joined.view(rows, length, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Attention over heads [B, H, L, D / H], joined again to [B, L, D]."""
    bias = None if mask is None else mask[:, None, None, :]
    in_bf16_on_cpu = kernel_device(query.device) == "cpu" and query.dtype == torch.bfloat16
    if in_bf16_on_cpu and not products.has_bf16_products():
        mixed = products.attention(query, key, value, bias, causal)
    elif in_bf16_on_cpu and key.shape[2] <= LONGEST_BY_MATMUL:
        mixed = _by_matmul(query, key, value, bias, causal)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def _by_matmul(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V as it is written, softmax in fp32; finite where no key counts, unlike with -inf."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    lowest = torch.finfo(logits.dtype).min
    if bias is not None:
        logits = logits.masked_fill(~bias, lowest)
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, lowest)
    mixed: Tensor = logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed


class SelfAttention(nn.Module):
    """Every token attends to all (or, causal, to earlier) tokens of its row."""

    def __init__(self, heads: int, scales: BlockScales, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        width = scales.width
        self.in_proj = Linear(width, 3 * width, std=scales.attention)
        self.out_proj = Linear(width, width, std=scales.residual)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, L, D] to [B, L, D]; a causal layer takes no mask."""
        query, key, value = _split_heads(self.in_proj(tokens), 3, self.heads)
        mixed: Tensor = self.out_proj(_attend(query, key, value, mask, self.causal))
        return mixed


class CrossAttention(nn.Module):
    """Queries attend to the tokens of another sequence of the same width."""

    def __init__(self, heads: int, scales: BlockScales) -> None:
        super().__init__()
        self.heads = heads
        width = scales.width
        self.query = Linear(width, width, std=scales.attention)
        self.key_value = Linear(width, 2 * width, std=scales.attention)
        self.out_proj = Linear(width, width, std=scales.residual)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map queries [B, L, D] and context [B, K, D] to [B, L, D]."""
        (query,) = _split_heads(self.query(queries), 1, self.heads)
        key, value = _split_heads(self.key_value(context), 2, self.heads)
        mixed: Tensor = self.out_proj(_attend(query, key, value, mask, causal=False))
        return mixed
