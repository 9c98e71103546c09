"""Which tokens masked language modelling hides, and what stands in their place (BERT, arXiv 1810.04805, section 3.1).

Enter: ids [B, L], which of them may be hidden, and each row's random key. Leave: corrupted ids and a fixed number of
slots K per row with positions, targets and weights, so that shapes never depend on the data. Everything random follows
from the row keys alone. Legend: B rows, L tokens, K slots, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmpretrain.layers.noise import uniform

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the hidden tokens, those that become the mask token, and those that become any token; the rest stay."""


class MaskedTokens(NamedTuple):
    """Corrupted rows and where to ask for the truth."""

    ids: Tensor
    """int64 [B, L]."""
    positions: Tensor
    """int64 [B, K]; distinct within a row."""
    targets: Tensor
    """int64 [B, K]: the original ids at `positions`."""
    weights: Tensor
    """fp32 [B, K]: 1 for slots in use, 0 for the others."""


@dataclass(frozen=True)
class TokenMasking:
    """The masking of one objective."""

    probability: float
    """Share of the eligible tokens of a row that are hidden: rounded to the nearest whole number, and at least one."""
    mask_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    """Never hidden, never put in place of another."""
    stream: str
    """Name of the random stream; objectives with different names hide different tokens."""

    def eligible(self, ids: Tensor, counts: Tensor) -> Tensor:
        """bool [B, L]: tokens that may be hidden, of those that count at all."""
        allowed = counts
        for special in self.special_ids:
            allowed = allowed & (ids != special)
        return allowed

    def num_hidden(self, eligible: Tensor) -> Tensor:
        """int64 [B]: how many tokens of each row are hidden; a row with nothing eligible hides none."""
        available = eligible.sum(1)
        wanted = torch.floor(available.double() * self.probability + 0.5).long().clamp(min=1)
        return torch.minimum(wanted, available)

    def num_slots(self, length: int) -> int:
        """K: what a row of `length` tokens could need at most."""
        return max(1, math.floor(length * self.probability + 0.5))

    def __call__(self, ids: Tensor, eligible: Tensor, draw: Tensor) -> MaskedTokens:
        """Hide the eligible tokens of lowest noise in each row."""
        length = ids.shape[1]
        noise = uniform(draw, length, f"{self.stream}.select").masked_fill(~eligible, 2.0)
        slots = torch.arange(self.num_slots(length), device=ids.device)
        positions = noise.argsort(dim=1, stable=True)[:, : slots.shape[0]]
        in_use = slots < self.num_hidden(eligible)[:, None]
        targets = ids.gather(1, positions)
        replaced = torch.where(in_use, self._replacements(targets, positions, length, draw), targets)
        return MaskedTokens(ids.scatter(1, positions, replaced), positions, targets, in_use.float())

    def _replacements(self, targets: Tensor, positions: Tensor, length: int, draw: Tensor) -> Tensor:
        choice = uniform(draw, length, f"{self.stream}.replace").gather(1, positions)
        token = self._ordinary_tokens(uniform(draw, length, f"{self.stream}.token").gather(1, positions))
        masked = torch.where(choice < MASKED_SHARE, self.mask_id, targets)
        at_random = (choice >= MASKED_SHARE) & (choice < MASKED_SHARE + RANDOM_SHARE)
        return torch.where(at_random, token, masked)

    def _ordinary_tokens(self, noise: Tensor) -> Tensor:
        """Map noise in [0, 1) to ids evenly, leaving the special ones out."""
        specials = sorted(set(self.special_ids))
        ordinary = self.vocab_size - len(specials)
        ids = (noise.double() * ordinary).long()
        for special in specials:
            ids = ids + (ids >= special)
        return ids
