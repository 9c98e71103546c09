"""Pre-norm transformer blocks, each one unit of activation checkpointing.

Shape legend: B rows, L tokens, K context tokens, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmpretrain.layers.attention import CrossAttention, SelfAttention
from mmpretrain.layers.initialization import BlockScales, Linear
from mmpretrain.layers.recompute import Recompute, checkpoint_options

Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]


def quick_gelu(values: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of OpenAI's CLIP weights."""
    return values * (1.702 * values).sigmoid()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
assert set(_ACTIVATIONS) == set(get_args(Activation))


class MLP(nn.Module):
    """Two linear layers around a nonlinearity."""

    def __init__(self, scales: BlockScales, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[activation]
        self.fc1 = Linear(scales.width, hidden, std=scales.hidden)
        self.fc2 = Linear(hidden, scales.width, std=scales.residual)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(self.activation(self.fc1(tokens)))
        return mixed


class CheckpointedBlock(nn.Module):
    """A block that, switched on and training, keeps little of its forward and computes the rest again in the backward.

    The first attribute has the name transformers looks for, so its own switch works on these blocks too.
    """

    gradient_checkpointing = False
    recompute: Recompute = "block"
    """What is computed again where checkpointing is on."""
    is_one = True
    """Whether it is a unit of its own, which `run` computes; else it is a row of units."""

    def run(self, *inputs: object) -> Tensor:
        """The block's own work."""
        raise NotImplementedError

    def forward(self, *inputs: object) -> Tensor:
        if self.gradient_checkpointing and self.training:
            recomputed: Tensor = checkpoint(self.run, *inputs, **checkpoint_options(self.recompute))
            return recomputed
        return self.run(*inputs)


class CheckpointedChain(CheckpointedBlock):
    """Modules one after the other under their own names, each a unit of checkpointing if it has parameters."""

    is_one = False

    def __init__(self, links: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, link in links.items():
            self.add_module(name, link)

    def forward(self, values: Tensor) -> Tensor:  # type: ignore[override]
        for link in self.children():
            values = self._link(link, values)
        return values

    def _link(self, link: nn.Module, values: Tensor) -> Tensor:
        whole = isinstance(link, CheckpointedChain) or next(link.parameters(), None) is None
        if whole or not (self.gradient_checkpointing and self.training):
            passed: Tensor = link(values)
            return passed
        recomputed: Tensor = checkpoint(link, values, **checkpoint_options(self.recompute))
        return recomputed


class Block(CheckpointedBlock):
    """Self-attention, then MLP, each on normalised tokens and added to the stream."""

    def __init__(
        self,
        scales: BlockScales,
        heads: int,
        hidden: int,
        causal: bool = False,
        activation: Activation = "gelu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(scales.width, eps=eps)
        self.attention = SelfAttention(heads, scales, causal)
        self.norm2 = nn.LayerNorm(scales.width, eps=eps)
        self.mlp = MLP(scales, hidden, activation)

    def run(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Map tokens [B, L, D] to [B, L, D]; `mask`, bool [B, L], is True where a token counts."""
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        fed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return fed


class CrossBlock(CheckpointedBlock):
    """Self-attention, cross-attention to a context, then MLP (ALBEF, Li et al. 2021, section 3.1)."""

    def __init__(self, scales: BlockScales, heads: int, hidden: int, causal: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(scales.width, eps=eps)
        self.attention = SelfAttention(heads, scales, causal)
        self.norm_cross = nn.LayerNorm(scales.width, eps=eps)
        self.norm_context = nn.LayerNorm(scales.width, eps=eps)
        self.cross_attention = CrossAttention(heads, scales)
        self.norm2 = nn.LayerNorm(scales.width, eps=eps)
        self.mlp = MLP(scales, hidden)

    def run(  # type: ignore[override]
        self, tokens: Tensor, context: Tensor, mask: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        """Map tokens [B, L, D], with context [B, K, D], to [B, L, D]; masks are True where a token counts; a causal
        block takes none for its tokens."""
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        context = self.norm_context(context)
        tokens = tokens + self.cross_attention(self.norm_cross(tokens), context, context_mask)
        fed: Tensor = tokens + self.mlp(self.norm2(tokens))
        return fed


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        activation: Activation = "gelu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        scales, hidden = BlockScales(width, depth), int(width * mlp_ratio)
        blocks: Iterable[Block] = (Block(scales, heads, hidden, causal, activation, eps) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens [B, L, D] to [B, L, D]; `mask`, bool [B, L], is True where a token counts."""
        for output in self.outputs(tokens, mask):
            tokens = output
        return tokens

    def outputs(self, tokens: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """What each block makes of tokens [B, L, D], first to last, one at a time."""
        for block in self.blocks:
            tokens = block(tokens, mask)
            yield tokens
