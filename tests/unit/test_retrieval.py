"""Retrieval ranks and recalls against a full score matrix in NumPy, and CLIP_benchmark's definition of recall."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.ranking import Embedded, chance_recall, query_ranks, recall_figures, top_rows


def unit_rows(count: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def full_matrix_ranks(queries: Embedded, gallery: Embedded) -> np.ndarray:
    """The whole score matrix at once; wrong answers of an equal score stand before the right one."""
    scores = (queries.vectors.double() @ gallery.vectors.double().T).float().numpy()
    right = queries.ids.numpy()[:, None] == gallery.ids.numpy()[None, :]
    best = np.where(right, scores, -np.inf).max(axis=1)
    return ((scores >= best[:, None]) & ~right).sum(axis=1) + 1


def benchmark_recall(scores: torch.Tensor, positives: torch.Tensor, k: int) -> float:
    """Recall as CLIP_benchmark counts it: one hit among the k best scores is enough."""
    hits = positives.gather(1, scores.topk(k, dim=1).indices)
    return float((hits.sum(dim=1) > 0).float().mean())


@pytest.fixture
def photos_and_captions() -> tuple[Embedded, Embedded]:
    """37 images with one to five captions each; captions lie near their image."""
    images = unit_rows(37, 12, seed=0)
    owners = torch.repeat_interleave(torch.arange(37), torch.arange(37) % 5 + 1)
    captions = F.normalize(images[owners] + 1.2 * unit_rows(len(owners), 12, seed=1), dim=1)
    return Embedded(images, torch.arange(37)), Embedded(captions, owners)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_ranks_equal_those_of_the_full_matrix_for_any_chunk(
    photos_and_captions: tuple[Embedded, Embedded], chunk: int
) -> None:
    images, captions = photos_and_captions
    for queries, gallery in ((images, captions), (captions, images)):
        ranks = query_ranks(queries, gallery, chunk=chunk)
        np.testing.assert_array_equal(ranks.numpy(), full_matrix_ranks(queries, gallery))
    assert len(full_matrix_ranks(captions, images).nonzero()[0]) == len(captions.ids)


def test_recall_equals_clip_benchmarks_definition(photos_and_captions: tuple[Embedded, Embedded]) -> None:
    images, captions = photos_and_captions
    scores = images.vectors @ captions.vectors.T
    positives = images.ids[:, None] == captions.ids[None, :]
    figures = recall_figures(query_ranks(images, captions))
    back = recall_figures(query_ranks(captions, images))
    for k in (1, 5, 10):
        assert figures[f"r@{k}"] == pytest.approx(benchmark_recall(scores, positives, k))
        assert back[f"r@{k}"] == pytest.approx(benchmark_recall(scores.T, positives.T, k))
    assert 0.2 < back["r@1"] < 1.0


def test_the_rank_of_an_image_is_that_of_its_best_caption() -> None:
    image = Embedded(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    captions = Embedded(torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [1.0, 0.0]]), torch.tensor([0, 1, 0, 2]))
    assert query_ranks(image, captions).tolist() == [2]


def test_a_collapsed_model_gains_nothing_from_ties() -> None:
    same = torch.ones(6, 4) / 2.0
    everything = Embedded(same, torch.arange(6))
    assert query_ranks(everything, everything).tolist() == [6] * 6
    assert recall_figures(query_ranks(everything, everything))["r@5"] == 0.0


def test_embeddings_that_are_not_numbers_rank_last() -> None:
    broken = Embedded(torch.full((5, 3), torch.nan), torch.arange(5))
    assert query_ranks(broken, broken).tolist() == [5] * 5


def test_median_and_mean_rank_count_from_one() -> None:
    figures = recall_figures(torch.tensor([1, 2, 9, 12]))
    assert figures == {"r@1": 0.25, "r@5": 0.5, "r@10": 0.75, "median_rank": 5.5, "mean_rank": 6.0}


def test_chance_is_the_recall_of_a_random_order() -> None:
    gallery = Embedded(torch.zeros(20, 2), torch.arange(20) // 2)
    queries = Embedded(torch.zeros(10, 2), torch.arange(10))
    generator = np.random.default_rng(0)
    hits = [(generator.permutation(20)[:5] < 2).any() for _ in range(20_000)]
    assert chance_recall(queries, gallery, 5) == pytest.approx(1 - (15 * 14) / (20 * 19))
    assert chance_recall(queries, gallery, 5) == pytest.approx(np.mean(hits), abs=0.02)
    assert chance_recall(queries, gallery, 1) == pytest.approx(0.1)
    assert chance_recall(queries, gallery, 50) == 1.0


def test_the_nearest_rows_come_best_first() -> None:
    gallery = Embedded(torch.eye(3), torch.tensor([10, 11, 12]))
    scores, ids = top_rows(torch.tensor([[0.1, 0.9, 0.3]]), gallery, k=2, chunk=1)
    assert ids.tolist() == [[11, 12]]
    assert scores[0].tolist() == pytest.approx([0.9, 0.3])


def test_a_query_without_a_right_answer_is_refused() -> None:
    images = Embedded(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="1 queries have no right answer"):
        query_ranks(Embedded(torch.eye(2), torch.tensor([0, 7])), images)


def test_no_queries_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="the shards hold no captions"):
        recall_figures(torch.zeros(0, dtype=torch.int64))
