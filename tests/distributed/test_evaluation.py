"""Every evaluation on three ranks with uneven parts, one of them empty, gives the figures of one process."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import evaluation_cases
import evaluation_zero_cases
import numpy as np
import pytest
import torch
from evaluation_cases import CLASSES, SAMPLES, WITHOUT_CAPTION, WITHOUT_IMAGE, captions, context_of, evaluate, samples
from launch import run_ranks
from open_clip import build_zero_shot_classifier
from PIL import Image
from torch.nn import functional as F

from mmpretrain.core.seeding import key_of
from mmpretrain.objectives.mae import normalise_patches
from mmpretrain.objectives.patches import at_patches

Figures = dict[str, float]
WHOLE = [[list(range(SAMPLES))]]
UNEVEN = [[[0, 1], [2, 3], [4]], [], [[5, 6, 7, 8], [9, 10]]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figures, Path]:
    """Figures and run folder of a single process that holds all samples in one batch."""
    folder = tmp_path_factory.mktemp("one")
    evaluate(WHOLE, folder)
    return json.loads((folder / "figures-0.json").read_text()), folder / "run"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Figures], Path]:
    """Figures of each of three ranks and their run folder."""
    folder = tmp_path_factory.mktemp("three")
    run_ranks(3, evaluation_cases.evaluate, UNEVEN, folder)
    return [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(3)], folder / "run"


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Case -> losses and figures of two ranks under DeepSpeed, evaluated in the midst of training."""
    folder = tmp_path_factory.mktemp("partitioned")
    run_ranks(2, evaluation_zero_cases.run_cases, folder)
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


def embeddings(run: Path) -> dict[str, dict[int, np.ndarray]]:
    """Modality -> sample -> its vector, of one process; of a text the first caption."""
    context, rows = context_of([], run), samples(range(SAMPLES))
    found = {m: context.embed(m, rows.tensors).numpy() for m in ("image", "text", "audio", "video")}
    return {
        m: {s: vectors[s] for s in range(SAMPLES) if rows.tensors[f"{m}.present"][s]} for m, vectors in found.items()
    }


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
    gallery = [s for s in range(SAMPLES) if s not in (WITHOUT_IMAGE, WITHOUT_CAPTION)]
    scores = images[gallery] @ texts.T
    to_image = [1 + int((scores[:, c] > scores[gallery.index(s), c]).sum()) for c, s in enumerate(owners)]
    of_sample = np.array(owners)[None, :] == np.array(gallery)[:, None]
    best = np.where(of_sample, scores, -np.inf).max(axis=1)
    to_text = [1 + int((row[~own] > top).sum()) for row, own, top in zip(scores, of_sample, best, strict=True)]
    assert figures["val/t2i_mean_rank"] == pytest.approx(np.mean(to_image))
    assert figures["val/i2t_mean_rank"] == pytest.approx(np.mean(to_text))
    assert figures["val/t2i_median_rank"] == pytest.approx(np.median(to_image))
    assert figures["val/i2t_r@5"] == pytest.approx(np.mean(np.array(to_text) <= 5))
    assert figures["val/t2i_chance_r@5"] == pytest.approx(5 / 9)


def test_retrieval_of_every_pair_compares_the_samples_that_hold_both(one: tuple[Figures, Path]) -> None:
    figures, run = one
    vectors = embeddings(run)
    for first, second in (("audio", "image"), ("audio", "video"), ("image", "video")):
        both = sorted(vectors[first].keys() & vectors[second].keys())
        u, v = (np.stack([vectors[modality][s] for s in both]) for modality in (first, second))
        for way, scores in ((f"{first[0]}2{second[0]}", u @ v.T), (f"{second[0]}2{first[0]}", v @ u.T)):
            ranks = 1 + (scores > np.diag(scores)[:, None]).sum(axis=1)
            assert figures[f"every/{way}_mean_rank"] == pytest.approx(np.mean(ranks)), way
            assert figures[f"every/{way}_r@1"] == pytest.approx(np.mean(ranks == 1)), way
            assert figures[f"every/{way}_chance_r@1"] == pytest.approx(1 / len(both)), way
    assert {
        name for name in figures if name.startswith("every/") and name.endswith("_r@1") and "chance" not in name
    } == {f"every/{a}2{b}_r@1" for a in "aitv" for b in "aitv" if a != b}
    assert figures["every/i2t_mean_rank"] == figures["val/i2t_mean_rank"]


def test_health_of_every_pair_equals_numpy(one: tuple[Figures, Path]) -> None:
    figures, run = one
    vectors = embeddings(run)
    for first, second in combinations(sorted(vectors), 2):
        both = sorted(vectors[first].keys() & vectors[second].keys())
        u, v = (np.stack([vectors[modality][s] for s in both]).astype(np.float64) for modality in (first, second))
        pair = f"{first}_{second}"
        assert figures[f"val/alignment_{pair}"] == pytest.approx(np.mean(np.sum((u - v) ** 2, axis=1)), rel=1e-5)
        gap = np.linalg.norm(u.mean(axis=0) - v.mean(axis=0))
        assert figures[f"val/modality_gap_{pair}"] == pytest.approx(gap, rel=1e-5)
    for modality, held in vectors.items():
        rows = np.stack(list(held.values())).astype(np.float64)
        distances = [np.sum((a - b) ** 2) for a, b in combinations(rows, 2)]
        uniformity = np.log(np.mean(np.exp(-2 * np.array(distances))))
        assert figures[f"val/uniformity_{modality}"] == pytest.approx(uniformity, rel=1e-5)
        values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
        shares = values / values.sum()
        rank = np.exp(-np.sum(shares * np.log(shares + 1e-300)))
        assert figures[f"val/effective_rank_{modality}"] == pytest.approx(rank, rel=1e-4)
    scale = context_of([], run).model.objectives["itc"].logit_scale.log.exp().item()
    assert figures["val/logit_scale_itc"] == pytest.approx(scale)


def test_retrieval_by_group_counts_any_sample_of_the_group(one: tuple[Figures, Path]) -> None:
    assert one[0]["half/t2i_chance_r@1"] == pytest.approx(0.5, abs=0.03)
    assert one[0]["half/t2i_r@10"] == 1.0


@pytest.mark.parametrize(("modality", "prefix"), [("image", "val"), ("audio", "sounds"), ("video", "videos")])
def test_zero_shot_classes_are_those_of_open_clip(one: tuple[Figures, Path], modality: str, prefix: str) -> None:
    figures, run = one
    context, codec = context_of([], run), evaluation_cases.text_codec()

    class Prompted:
        """The text tower as open_clip calls it."""

        def encode_text(self, encoded: dict[str, torch.Tensor], normalize: bool) -> torch.Tensor:
            assert normalize
            return context.embed("text", encoded)

    class Encoded(dict[str, torch.Tensor]):
        """What a tokenizer gives open_clip, which moves it to a device."""

        def to(self, device: str) -> "Encoded":
            return self

    def tokenizer(texts: list[str]) -> Encoded:
        return Encoded({name: torch.from_numpy(array) for name, array in codec.encode(texts).items()})

    templates = [lambda name: f"w20 {name}", lambda name: f"{name} w30"]
    weights = build_zero_shot_classifier(Prompted(), tokenizer, CLASSES, templates, num_classes_per_batch=2)
    held = embeddings(run)[modality]
    hits = [int((vector @ weights.numpy()).argmax()) == s % 3 for s, vector in held.items()]
    assert figures[f"{prefix}/zeroshot_top1"] == pytest.approx(np.mean(hits))
    assert figures[f"{prefix}/zeroshot_top5"] == 1.0
    assert figures[f"{prefix}/zeroshot_chance"] == pytest.approx(1 / 3)


def test_probes_see_the_embeddings_and_the_pooled_vectors(one: tuple[Figures, Path]) -> None:
    figures, run = one
    held = embeddings(run)["image"]
    rows, labels = np.stack(list(held.values())), np.array([s % 3 for s in held])
    nearest = np.argsort(-(rows @ rows.T), axis=1)[:, :3]
    votes = np.zeros((len(rows), 3))
    for row, others in enumerate(nearest):
        np.add.at(votes[row], labels[others], np.exp(rows[row] @ rows[others].T / 0.07))
    assert figures["val/knn_image_top1"] == pytest.approx(np.mean(votes.argmax(axis=1) == labels))
    assert figures["val/knn_image_chance"] == pytest.approx(np.mean(labels == np.bincount(labels).argmax()))
    assert {"val/probe_image_top1", "val/probe_image_mean_class", "val/probe_audio_top1"} <= set(figures)
    assert figures["val/probe_image_top1"] > figures["val/probe_image_chance"]


def test_a_loss_without_a_modality_is_that_of_a_fusion_over_the_others(one: tuple[Figures, Path]) -> None:
    context = context_of([], one[1])
    batch = context.batch(samples(range(SAMPLES)))
    objective, mae, aware = (context.model.objectives[name] for name in ("mlm_seen", "mae", "mae_told"))
    told = batch["text.mask"] & torch.stack([batch[f"{m}.present"] for m in ("text", "image", "audio")]).all(0)[:, None]
    masked = objective.masking(batch["text"], objective.masking.eligible(batch["text"], told), batch["draw"])
    places, weights = masked.positions[:, :, None], masked.weights.flatten()
    with torch.no_grad():
        encoder = context.model.encoder(batch)
        towers = {m: encoder.tower(m) for m in ("image", "audio")} | {"text": encoder.tower("text", ids=masked.ids)}
        for taken in ("", "image", "audio"):
            fused = encoder.fuse({m: output for m, output in towers.items() if m != taken})["text"]
            hidden = objective.head(fused.gather(1, places.expand(-1, -1, fused.shape[-1])).flatten(0, 1))
            logits = objective.bias(encoder.vocabulary_logits("text", hidden))
            losses = F.cross_entropy(logits, masked.targets.flatten(), reduction="none")
            figure = f"val/loss_mlm_seen{taken and '_no_' + taken}"
            assert one[0][figure] == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-5)
            right = (((logits.argmax(-1) == masked.targets.flatten()) * weights).sum() / weights.sum()).item()
            assert one[0][f"val/mlm_seen_acc{taken and '_no_' + taken}"] == pytest.approx(right)
        reconstructed = mae.encode(encoder)["sum"] / mae.count(batch)
        split = aware.masking(batch["draw"])
        seen = encoder.fuse({"image": encoder.tower("image", keep=split.visible)})["image"]
        patches = encoder.patches("image")
        targets = normalise_patches(at_patches(patches, split.hidden))
        errors = (aware.decoder(seen, split.visible, split.hidden) - targets).square().mean(-1).sum(1)
    blind = errors[aware.present(batch)].sum() / aware.count(batch)
    assert one[0]["val/loss_mae_told_no_text"] == pytest.approx(blind.item(), rel=1e-5)
    assert one[0]["val/loss_mae_told"] != pytest.approx(blind.item(), rel=1e-6)
    assert one[0]["val/loss_mae"] == pytest.approx(reconstructed.item(), rel=1e-5)
    assert one[0]["val/loss_mlm_seen_no_image"] != pytest.approx(one[0]["val/loss_mlm_seen"], rel=1e-6)
    assert not {"val/loss_itc", "val/loss_mae_no_image", "val/loss_features_no_video"} & set(one[0])
    assert one[0]["val/loss_features"] > 0


def test_masked_words_are_counted_with_and_without_the_right_image(one: tuple[Figures, Path]) -> None:
    words = {name.removeprefix("val/mlm_") for name in one[0] if name.startswith("val/mlm_")}
    alone = {f"seen_acc_{way}_{m}" for way in ("no", "shuffled") for m in ("image", "audio")}
    assert words == alone | {"acc", "acc_guess", "image_acc", "image_acc_guess", "image_acc_shuffled"} | {
        "image_acc_no_image", "seen_acc", "seen_acc_guess", "seen_acc_shuffled"
    }  # fmt: skip
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
    whole = partitioned["zero2"]["figures"]
    assert len(whole) > 30
    assert partitioned["zero3"]["figures"] == pytest.approx(whole, abs=1e-4)


def test_evaluating_leaves_training_as_it_was(partitioned: dict[str, dict[str, Any]]) -> None:
    assert partitioned["zero3"]["losses"] == partitioned["zero3 without"]["losses"]


def own_picture(key: str) -> str:
    """Path of the thumbnail of a sample: rows are numbered without those that lack an image or a caption."""
    number = int(key.removeprefix("shard/"))
    return f"thumbnails/{number - sum(number > lacking for lacking in (WITHOUT_IMAGE, WITHOUT_CAPTION)):08d}.jpg"
