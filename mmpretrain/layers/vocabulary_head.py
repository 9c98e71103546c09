"""From hidden states to scores of words, with the word embeddings as the last matrix.

Enter: hidden states [..., D]. Leave: vectors of the width of the words, then, once scored against them, logits in fp32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpretrain.layers.initialization import Linear
from mmpretrain.layers.pair_tiles import full_precision


class TokenHead(nn.Module):
    """Hidden states to the width of the word embeddings, ready to be scored against them."""

    def __init__(self, in_width: int, word_width: int) -> None:
        super().__init__()
        self.dense = Linear(in_width, word_width, std=in_width**-0.5)
        self.norm = nn.LayerNorm(word_width)

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(functional.gelu(self.dense(hidden)))
        return normed


class VocabularyBias(nn.Module):
    """One learned offset per word, added to logits in fp32."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, logits: Tensor) -> Tensor:
        return full_precision(logits) + self.weight
