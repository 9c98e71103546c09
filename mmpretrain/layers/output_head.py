"""The head of objectives that tell something from one vector. Legend: B rows, D width, C outputs."""

from torch import Tensor, nn

from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.pair_tiles import full_precision


class OutputHead(nn.Module):
    """LayerNorm and one linear layer, small at first so that all outputs start alike."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.predict = Linear(width, outputs, std=0.01)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map [B, D] to [B, C] in fp32."""
        return full_precision(self.predict(self.norm(pooled)))
