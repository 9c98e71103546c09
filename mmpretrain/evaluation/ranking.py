"""Ranks of the right answers in a gallery that is spread over processes, exact and without a full score matrix.

Enter: unit embeddings and integer ids of this rank's queries and gallery; a gallery row is right for a query when the
ids are equal, so several right answers (captions of one image) are the normal case. Leave: each query's rank, the
position of its best right answer counted from 1. Ties are pessimistic: a wrong answer with an equal score (or none,
NaN) stands before it. Refused: a query without a right answer. Recall@k is CLIP_benchmark's
(github.com/LAION-AI/CLIP_benchmark, zeroshot_retrieval.py): a hit when any right answer stands among the first k.

Scores are float64 products rounded to float32, so that equal embeddings tie exactly however the blocks are cut.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, lgamma

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum, gather_rows
from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.lockstep import gather_ragged, lengths

RECALL_AT = (1, 5, 10)
NO_ID = -1
"""Id of padding rows; ids of real rows are not negative."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings [n, D] of this rank with the id of each row, int64 [n]."""

    vectors: Tensor
    ids: Tensor


def query_ranks(queries: Embedded, gallery: Embedded, chunk: int = 1024) -> Tensor:
    """Rank of each of this rank's queries, int64 [n]. Communicates: walks the gallery of all ranks twice."""
    best = torch.full((len(queries.ids),), -torch.inf, device=queries.vectors.device)
    for block in gallery_blocks(gallery, chunk):
        for rows, scores in _scores(queries, block, chunk):
            right = queries.ids[rows, None] == block.ids[None, :]
            best[rows] = torch.maximum(best[rows], scores.masked_fill(~right, -torch.inf).amax(dim=1))
    unanswered = int(all_reduce_sum(torch.isneginf(best).sum()))
    if unanswered:
        raise DataError(
            f"{unanswered} queries have no right answer in the gallery; "
            "every caption needs its image in the evaluated shards"
        )
    before = torch.zeros_like(queries.ids)
    for block in gallery_blocks(gallery, chunk):
        for rows, scores in _scores(queries, block, chunk):
            wrong = (queries.ids[rows, None] != block.ids[None, :]) & (block.ids[None, :] != NO_ID)
            before[rows] += (~(scores < best[rows, None]) & wrong).sum(dim=1)
    return before + 1


def top_rows(queries: Tensor, gallery: Embedded, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Scores and ids, each [n, <= k], of the nearest gallery rows of all ranks. Communicates."""
    scores = queries.new_full((len(queries), 0), 0.0, dtype=torch.float32)
    ids = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for block in gallery_blocks(gallery, chunk):
        real = block.ids != NO_ID
        found = _products(queries, block.vectors[real])
        scores = torch.cat([scores, found], dim=1)
        ids = torch.cat([ids, block.ids[real].expand(len(queries), -1)], dim=1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        scores, ids = scores.gather(1, order), ids.gather(1, order)
    return scores, ids


def recall_figures(ranks: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10, median and mean rank over the queries of all ranks. Communicates."""
    every = gather_ragged(ranks).double()
    if not len(every):
        raise DataError("retrieval saw no queries; the shards hold no captions")
    figures = {f"r@{k}": float((every <= k).double().mean()) for k in RECALL_AT}
    return {**figures, "median_rank": float(every.quantile(0.5)), "mean_rank": float(every.mean())}


def chance_recall(queries: Embedded, gallery: Embedded, k: int) -> float:
    """Expected recall@k of a random order: the mean of 1 - C(N - p, k) / C(N, k), p right ones of N. Communicates."""
    every = gather_ragged(gallery.ids)
    size = len(every)
    right = Counter(every.tolist())
    asked = Counter(right[number] for number in gather_ragged(queries.ids).tolist())
    hits = sum(count * (1.0 - _miss(size, answers, min(k, size))) for answers, count in asked.items())
    return hits / asked.total()


def gallery_blocks(gallery: Embedded, chunk: int) -> Iterator[Embedded]:
    """Walk the gallery of all ranks in blocks of world size x chunk rows, padded with NO_ID. Communicates."""
    longest = max(lengths(len(gallery.ids)))
    for start in range(0, longest, chunk):
        width = min(chunk, longest - start)
        part = gallery.vectors[start : start + width]
        vectors = part.new_zeros(width, gallery.vectors.shape[1])
        ids = torch.full((width,), NO_ID, dtype=torch.int64, device=part.device)
        vectors[: len(part)], ids[: len(part)] = part, gallery.ids[start : start + width]
        yield Embedded(gather_rows(vectors), gather_rows(ids))


def _scores(queries: Embedded, block: Embedded, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(queries.ids), chunk):
        rows = slice(start, start + chunk)
        yield rows, _products(queries.vectors[rows], block.vectors)


def _products(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() @ right.double().T).float()


def _miss(size: int, right: int, k: int) -> float:
    """C(size - right, k) / C(size, k), by logarithms."""
    if size - right < k:
        return 0.0
    ways = [lgamma(n + 1) - lgamma(n - k + 1) for n in (size - right, size)]
    return exp(ways[0] - ways[1])
