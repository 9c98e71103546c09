"""Every evaluation on three ranks with uneven parts, one of them empty, gives the figures of one process."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import evaluation_cases
import numpy as np
import pytest
import torch
from evaluation_cases import CLASSES, SAMPLES, WITHOUT_CAPTION, WITHOUT_IMAGE, captions, context_of, run_rank, samples
from launch import run_ranks
from PIL import Image
from torch.multiprocessing import start_processes

from mmpretrain.core.seeding import key_of

Figures = dict[str, float]
WHOLE = [[list(range(SAMPLES))]]
UNEVEN = [[[0, 1], [2, 3], [4]], [], [[5, 6, 7, 8], [9, 10]]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figures, Path]:
    """Figures and run folder of a single process that holds all samples in one batch."""
    folder = tmp_path_factory.mktemp("one")
    run_rank(0, WHOLE, folder)
    return json.loads((folder / "figures-0.json").read_text()), folder / "run"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Figures], Path]:
    """Figures of each of three ranks and their run folder."""
    folder = tmp_path_factory.mktemp("three")
    multiprocessing.set_forkserver_preload(["evaluation_cases"])
    start_processes(evaluation_cases.run_rank, (UNEVEN, folder), nprocs=3, start_method="forkserver")
    return [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(3)], folder / "run"


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> losses and figures of two ranks under DeepSpeed, evaluated in the midst of training."""
    folder, here = tmp_path_factory.mktemp("partitioned"), Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here.parents[1]), str(here.parent)]))
        run_ranks(2, [str(here / "evaluation_zero_cases.py"), str(folder)])
    found: dict[str, dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def unit_embeddings(run: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Image and caption vectors of one process, and the sample of each caption."""
    context = context_of([], run)
    rows = samples(range(SAMPLES))
    images = context.embed("image", rows.tensors).numpy()
    owners = [s for s in range(SAMPLES) for _ in captions(s) if s != WITHOUT_IMAGE]
    texts = [text for s in range(SAMPLES) if s != WITHOUT_IMAGE for text in captions(s)]
    encoded = {name: torch.from_numpy(array) for name, array in evaluation_cases.text_codec().encode(texts).items()}
    return images, context.embed("text", encoded).numpy(), owners


def test_every_rank_ends_with_the_figures_of_one_process(
    one: tuple[Figures, Path], three: tuple[list[Figures], Path]
) -> None:
    for figures in three[0]:
        assert figures == three[0][0]
    assert set(three[0][0]) == set(one[0])
    for name, value in one[0].items():
        assert three[0][0][name] == pytest.approx(value, abs=1e-5), name


def test_retrieval_of_the_model_equals_the_full_matrix(one: tuple[Figures, Path]) -> None:
    figures, run = one
    images, texts, owners = unit_embeddings(run)
    scores = np.delete(images, WITHOUT_IMAGE, axis=0) @ texts.T
    gallery = [s for s in range(SAMPLES) if s != WITHOUT_IMAGE]
    to_image = [1 + int((scores[:, c] > scores[gallery.index(s), c]).sum()) for c, s in enumerate(owners)]
    of_sample = np.array(owners)[None, :] == np.array(gallery)[:, None]
    asking = [row for row, s in enumerate(gallery) if s != WITHOUT_CAPTION]
    best = np.where(of_sample, scores, -np.inf).max(axis=1)
    to_text = [1 + int((scores[row][~of_sample[row]] > best[row]).sum()) for row in asking]
    assert figures["val/t2i_mean_rank"] == pytest.approx(np.mean(to_image))
    assert figures["val/i2t_mean_rank"] == pytest.approx(np.mean(to_text))
    assert figures["val/t2i_median_rank"] == pytest.approx(np.median(to_image))
    assert figures["val/i2t_r@5"] == pytest.approx(np.mean(np.array(to_text) <= 5))
    assert figures["val/t2i_chance_r@5"] == pytest.approx(0.5)


def test_retrieval_by_group_counts_any_sample_of_the_group(one: tuple[Figures, Path]) -> None:
    assert one[0]["half/t2i_chance_r@1"] == pytest.approx(0.5, abs=0.03)
    assert one[0]["half/t2i_r@10"] == 1.0


def test_zero_shot_averages_templates_after_normalising(one: tuple[Figures, Path]) -> None:
    figures, run = one
    context = context_of([], run)
    images, _, _ = unit_embeddings(run)
    weights = []
    for name in CLASSES:
        encoded = evaluation_cases.text_codec().encode([f"w20 {name}", f"{name} w30"])
        vectors = context.embed("text", {key: torch.from_numpy(array) for key, array in encoded.items()}).numpy()
        weights.append(vectors.mean(axis=0) / np.linalg.norm(vectors.mean(axis=0)))
    guesses = (images @ np.stack(weights).T).argmax(axis=1)
    hits = [guesses[s] == s % 3 for s in range(SAMPLES) if s != WITHOUT_IMAGE]
    assert figures["val/zeroshot_top1"] == pytest.approx(np.mean(hits))
    assert figures["val/zeroshot_top5"] == 1.0
    assert figures["val/zeroshot_chance"] == pytest.approx(1 / 3)


def test_masked_words_are_counted_with_and_without_the_right_image(one: tuple[Figures, Path]) -> None:
    assert {"val/mlm_acc", "val/mlm_acc_guess", "val/mlm_image_acc", "val/mlm_image_acc_shuffled"} <= set(one[0])
    assert "val/mlm_acc_shuffled" not in one[0]
    context = context_of([], one[1])
    rows = samples(range(SAMPLES))
    objective = context.model.objectives["mlm_image"]
    draws = torch.tensor([key_of(0, "evaluation", key) >> 1 for key in rows.keys])
    present = rows.tensors["image.present"]
    for name, steps in (("val/mlm_image_acc", 0), ("val/mlm_image_acc_shuffled", 1)):
        images = rows.tensors["image"].clone()
        images[present] = images[present].roll(steps, dims=0)
        with torch.no_grad():
            parts = objective.encode(context.model.encoder({**rows.tensors, "image": images, "draw": draws}))
        assert one[0][name] == pytest.approx((parts["correct"] / parts["count"]).item())


def test_sample_retrievals_name_pictures_that_exist(
    one: tuple[Figures, Path], three: tuple[list[Figures], Path]
) -> None:
    records = [json.loads((run / "evaluation" / "retrieval-samples.json").read_text()) for run in (one[1], three[1])]
    assert len(records[0]) == 4
    for first, second in zip(*records, strict=True):
        assert first["scores"] == pytest.approx(second["scores"], abs=2e-4)
        assert {**first, "scores": []} == {**second, "scores": []}
    for record in records[1]:
        pictures = [three[1] / "evaluation" / name for name in record["images"]]
        assert len(pictures) == len(record["scores"]) == 5
        assert record["scores"] == sorted(record["scores"], reverse=True)
        assert all(Image.open(picture).size == (16, 16) for picture in pictures)
        if record["correct"] is not None:
            assert record["images"][record["correct"]] == own_picture(record["key"])


def test_a_partitioned_model_has_the_figures_of_a_whole_one(partitioned: dict[str, dict[str, Any]]) -> None:
    whole = partitioned["zero0"]["figures"]
    assert len(whole) > 30
    for stage in ("zero2", "zero3"):
        assert partitioned[stage]["figures"] == pytest.approx(whole, abs=1e-4)


def test_evaluating_leaves_training_as_it_was(partitioned: dict[str, dict[str, Any]]) -> None:
    assert partitioned["zero3"]["losses"] == partitioned["zero3 without"]["losses"]


def own_picture(key: str) -> str:
    """Path of the thumbnail of a sample: rows are numbered without the one that has no image."""
    number = int(key.removeprefix("shard/"))
    return f"thumbnails/{number - (number > WITHOUT_IMAGE):08d}.jpg"
