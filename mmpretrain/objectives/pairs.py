"""What objectives over pairs of two modalities share: which pairs, who is present, the health of the space.

Enter: a batch or a chunk's encoder. Leave: row-aligned parts, and scalars that tell a collapse early. Refuses a pair of
one modality with itself, and entries that name their pairs twice. Legend: b pairs of this rank, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Self

import torch
from pydantic import AfterValidator, model_validator
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.pair_tiles import full_precision
from mmpretrain.objectives.base import Encoder, ObjectiveConfig


def _two_different(pair: tuple[str, str]) -> tuple[str, str]:
    if pair[0] == pair[1]:
        raise ValueError(f"both modalities are {pair[0]!r}; name two different ones, e.g. [image, text]")
    return pair


PairOfModalities = Annotated[tuple[str, str], AfterValidator(_two_different)]


class ContrastiveConfig(ObjectiveConfig):
    """Config of a contrast of one pair of modalities, or of several pairs that share nothing but these settings.

    An entry of several pairs stands for one objective for each, called <name>_<first>_<second>: each has its own scale,
    count and loss, and weighs `weight`, so that the entry adds the sum over its pairs to the total loss.
    """

    pair: PairOfModalities | None = None
    """The two modalities whose embeddings meet; null, unless pairs or hub are given: image and text."""
    pairs: tuple[PairOfModalities, ...] = ()
    """Several pairs, e.g. [[image, text], [image, audio]]."""
    hub: str | None = None
    """A modality that meets each other one of the model, e.g. image (ImageBind, arXiv 2305.05665)."""

    @model_validator(mode="after")
    def _pairs_named_once(self) -> Self:
        given = [name for name, value in (("pair", self.pair), ("pairs", self.pairs), ("hub", self.hub)) if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both name the modalities that meet; keep one of them")
        named = [frozenset(pair) for pair in self.pairs]
        for pair in self.pairs:
            if named.count(frozenset(pair)) > 1:
                raise ValueError(f"pairs names {list(pair)} twice, in this order or the other; name each pair once")
        return self

    @property
    def single(self) -> tuple[str, str]:
        """The pair of an entry that has one."""
        assert not self.pairs and self.hub is None, "an entry of several pairs is expanded before it is built"
        return self.pair or ("image", "text")

    @property
    def modalities(self) -> tuple[str, ...]:
        if self.hub is not None:
            return (self.hub,)
        return tuple(dict.fromkeys(m for pair in self.pairs for m in pair)) or self.single

    def expand(self, name: str, modalities: Iterable[str]) -> Mapping[str, ObjectiveConfig]:
        pairs = self.pairs
        if self.hub is not None:
            pairs = tuple((self.hub, other) for other in sorted(modalities) if other != self.hub)
            if not pairs:
                raise ConfigError(
                    f"the hub {self.hub} of objective {name} meets no other modality; add a tower beside "
                    f"model.towers.{self.hub}"
                )
        if not pairs:
            return {name: self}
        return {"_".join((name, *pair)): self._of(pair) for pair in pairs}

    def _of(self, pair: tuple[str, str]) -> Self:
        return self.model_copy(update={"pair": pair, "pairs": (), "hub": None})


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
