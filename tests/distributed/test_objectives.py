"""Objectives on 1, 2 and 4 ranks, in 1, 2 and 4 chunks: one loss and one gradient, that of NumPy and of open_clip."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import objective_cases
import pytest
import torch
from contrastive_reference import Matrix, Reference, infonce, siglip, through_tower, unit_rows
from launch import run_ranks
from objective_cases import CONTRASTIVE
from safetensors.torch import load_file
from torch import Tensor

Results = dict[int, dict[str, dict[str, Tensor]]]
RANKS = (1, 2, 4)
SCALE = {name: math.exp(np.float32(math.log(config.scale_init))) for name, config in CONTRASTIVE.items()}
"""The factor whose logarithm is an fp32 parameter."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Number of ranks -> case -> loss, gradients and metrics."""
    folder = tmp_path_factory.mktemp("objectives")
    found: Results = {}
    for ranks in RANKS:
        run_ranks(ranks, objective_cases.run_cases, folder)
        found[ranks] = {}
        for key, tensor in load_file(folder / f"ranks-{ranks}.safetensors").items():
            case, name = key.split(":", 1)
            found[ranks].setdefault(case, {})[name] = tensor
    return found


def reference(name: str, absent: str) -> dict[str, Matrix]:
    """Loss and gradients of the global batch in NumPy."""
    given = objective_cases.inputs()
    first, second = (unit_rows(given[m] @ given[f"{m}_weight"]) for m in ("image", "text"))
    present = np.ones(objective_cases.ROWS, dtype=bool)
    present[list(objective_cases.ABSENT[absent])] = False
    formula: Callable[..., Reference] = infonce
    if name != "infonce":
        formula = partial(siglip, bias=objective_cases.SIGLIP_BIAS)
    result = formula(first, second, SCALE[name], present=present)
    expected = {
        "loss": np.array([result.loss]),
        "image": through_tower(given["image"], given["image_weight"], result.first),
        "text": through_tower(given["text"], given["text_weight"], result.second),
        "logit_scale.log": np.array([SCALE[name] * result.scale]),
    }
    return expected if name == "infonce" else expected | {"logit_bias.value": np.array([result.bias])}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("absent", ["all", "some"])
@pytest.mark.parametrize("name", SCALE)
def test_contrastive_loss_and_gradients_equal_numpy_in_any_number_of_chunks(
    results: Results, name: str, absent: str, ranks: int
) -> None:
    expected = reference(name, absent)
    for chunks in objective_cases.CHUNKS:
        found = results[ranks][f"{name}/{absent}/{chunks}"]
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=0, atol=2e-7 if "logit" in key else 1e-12, err_msg=key)


@pytest.mark.parametrize("ranks", RANKS)
def test_ring_equals_gather(results: Results, ranks: int) -> None:
    for absent in objective_cases.ABSENT:
        ring, gather = (results[ranks][f"siglip_{exchange}/{absent}/1"] for exchange in ("ring", "gather"))
        for name in ("loss", "image", "text", "embed/in_batch_r1"):
            torch.testing.assert_close(ring[name], gather[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("ours", "theirs"), [("infonce", "infonce"), ("siglip_ring", "siglip")])
def test_gradients_equal_those_of_open_clip_on_as_many_ranks(
    results: Results, ours: str, theirs: str, ranks: int
) -> None:
    found, expected = results[ranks][f"{ours}/all/1"], results[ranks][f"open_clip/{theirs}"]
    for name in ("loss", "image", "text"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4])
def test_metrics_do_not_depend_on_the_number_of_ranks(results: Results, ranks: int) -> None:
    for name in SCALE:
        found, one = (results[number][f"{name}/some/1"] for number in (ranks, 1))
        for metric in (key for key in one if key.startswith("embed/")):
            torch.testing.assert_close(found[metric], one[metric], msg=metric)


def test_thirteen_and_seven_hidden_tokens_on_two_ranks_train_as_twenty_on_one(results: Results) -> None:
    one, two = results[1]["masked"], results[2]["masked"]
    assert [two[f"count.mlm.{rank}"].item() for rank in range(2)] == [13, 7]
    assert [two[f"count.mlm_image.{rank}"].item() for rank in range(2)] == [7, 7]
    assert [two[f"count.mim.{rank}"].item() for rank in range(2)] == [12, 24]
    assert math.isfinite(one["loss"].item())
    compared = [name for name in one if not name.startswith("count.")]
    assert {"metric.mlm_acc", "metric.image_mlm_acc"} < set(compared)
    for name in compared:
        torch.testing.assert_close(
            two[name], one[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_every_other_objective_trains_alike_on_any_ranks_in_any_chunks(
    results: Results, ranks: int, chunks: int
) -> None:
    """Matching, patches after fusion, features of a teacher, a class from both; captions."""
    expected = {"metric.itm_acc", "metric.target_std", "metric.class_acc", "objectives.itm.head.predict.weight"}
    assert expected < results[1]["together/1"].keys()
    assert "metric.caption_acc" in results[1]["caption/1"]
    for case in ("together", "caption"):
        one, found = results[1][f"{case}/1"], results[ranks][f"{case}/{chunks}"]
        assert found.keys() == one.keys()
        assert not any("teacher" in name for name in one)
        for name, value in one.items():
            torch.testing.assert_close(
                found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("ranks", RANKS)
def test_each_pair_of_a_hub_counts_its_own_rows_and_has_its_own_scale(results: Results, ranks: int) -> None:
    given, found = objective_cases.inputs(), results[ranks]["hub"]
    units = {m: unit_rows(given[m] @ given[f"{m}_weight"]) for m in ("image", "text", "audio")}
    absent = {"text": objective_cases.ABSENT["some"], "audio": objective_cases.WITHOUT_AUDIO}
    total, image = 0.0, np.zeros_like(given["image_weight"])
    for other, missing in absent.items():
        present = ~np.isin(np.arange(objective_cases.ROWS), missing)
        expected = infonce(units["image"], units[other], SCALE["infonce"], present=present)
        own = through_tower(given[other], given[f"{other}_weight"], expected.second)
        np.testing.assert_allclose(found[f"loss.itc_image_{other}"], [expected.loss], atol=1e-12)
        np.testing.assert_allclose(found[other], own, atol=1e-12)
        scale = found[f"itc_image_{other}.logit_scale.log"]
        np.testing.assert_allclose(scale, [SCALE["infonce"] * expected.scale], atol=2e-7)
        total += expected.loss
        image += through_tower(given["image"], given["image_weight"], expected.first)
    np.testing.assert_allclose(found["loss"], [total], atol=1e-12)
    np.testing.assert_allclose(found["image"], image, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS)
def test_gathered_rows_stand_in_rank_order_and_collect_the_gradient_of_all_ranks(results: Results, ranks: int) -> None:
    found = results[ranks]["gather"]
    assert found["rows"].tolist() == [[rank, rank] for rank in range(ranks)]
    assert found["grad"].tolist() == [[sum(range(1, ranks + 1))] * 2]
    assert found["highest"].item() == ranks - 1
