"""What objectives over pairs of two modalities share: who is present, the parts they keep, the health of the space.

Enter: a batch or a chunk's encoder. Leave: row-aligned parts, and scalars that tell a collapse early. Refuses a pair of
one modality with itself. Legend: b pairs of this rank, D embedding width.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.pair_tiles import full_precision
from mmpretrain.objectives.base import Encoder


def _two_different(pair: tuple[str, str]) -> tuple[str, str]:
    if pair[0] == pair[1]:
        raise ValueError(f"both modalities are {pair[0]!r}; name two different ones, e.g. [image, text]")
    return pair


PairOfModalities = Annotated[tuple[str, str], AfterValidator(_two_different)]


def pairs_present(batch: TensorDict, pair: tuple[str, str]) -> Tensor:
    """bool [b]: rows that have both modalities."""
    return batch[f"{pair[0]}.present"] & batch[f"{pair[1]}.present"]


def encode_pairs(encoder: Encoder, pair: tuple[str, str]) -> TensorDict:
    """{"first": [b, D], "second": [b, D], "present": bool [b]}; absent rows are zeros and get exactly zero gradient."""
    present = pairs_present(encoder.batch, pair)
    absent = ~present[:, None]
    first, second = (full_precision(encoder.embed(modality)) for modality in pair)
    return {
        "first": first.masked_fill(absent, 0.0),
        "second": second.masked_fill(absent, 0.0),
        "present": present,
    }


@torch.no_grad()
def pair_metrics(parts: TensorDict) -> TensorDict:
    """Cosines of pairs and of all others, distance of the modality means, share of rows that find their pair.

    Over the global batch, by one all-reduce of 2 D + 3 numbers: the mean over the B (B - 1) negatives follows from the
    sums of both sides. Communicates.
    """
    first, second, present = parts["first"], parts["second"], parts["present"]
    width = first.shape[1]
    scalars = torch.stack([(first * second).sum(), present.sum(), (parts["wins"] & present).sum()])
    total = all_reduce_sum(torch.cat([first.sum(0), second.sum(0), scalars.to(first.dtype)]))
    first_sum, second_sum = total[:width], total[width : 2 * width]
    positives, count, wins = total[2 * width :]
    pairs = count.clamp(min=1)
    return {
        "embed/pos_sim": positives / pairs,
        "embed/neg_sim": (first_sum @ second_sum - positives) / (pairs * (pairs - 1)).clamp(min=1),
        "embed/modality_gap": torch.linalg.vector_norm(first_sum - second_sum) / pairs,
        "embed/in_batch_r1": wins / pairs,
    }
