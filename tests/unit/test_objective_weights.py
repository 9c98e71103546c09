"""Weights of objectives over the steps: straight between points, reported, written out and read back."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_model import build_model, rows_of

from mmpretrain.config import RunConfig, configs_folder, load_run_config
from mmpretrain.core.config import dump_yaml, parse_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.mae import MAEConfig
from mmpretrain.objectives.weights import WeightPoint, weight_at
from mmpretrain.training.engine import StepResult
from mmpretrain.training.reporting import Reporter
from mmpretrain.training.requests import Requests

POINTS = tuple(WeightPoint(from_step=step, weight=weight) for step, weight in ((10, 0.0), (20, 2.0), (21, 5.0)))
MIM = MAEConfig(weight=POINTS, decoder_width=32, decoder_depth=1, decoder_heads=4)


def run(*overrides: str) -> RunConfig:
    return load_run_config(configs_folder() / "demo.yaml", overrides)


def test_a_weight_runs_straight_between_its_points_and_stays_beyond_them() -> None:
    steps = range(30)
    expected = np.interp(steps, [10, 20, 21], [0.0, 2.0, 5.0])
    assert [weight_at(POINTS, step) for step in steps] == pytest.approx(expected.tolist())
    assert {weight_at(0.3, step) for step in steps} == {0.3}


def test_the_loss_of_a_step_has_the_weights_of_that_step() -> None:
    model, rows = build_model({"itc": InfoNCEConfig(), "mim": MIM}), rows_of([3, 4, 5])
    one = {name: torch.tensor(1.0) for name in ("itc", "mim")}
    assert model.scheduled == ("mim",)
    for step, weight in ((0, 0.0), (15, 1.0), (40, 5.0)):
        model.begin_step(step)
        output = model([rows], one)
        torch.testing.assert_close(output["loss"], output["sum.itc"] + weight * output["sum.mim"])


def test_the_report_weighs_with_the_weights_of_its_step_and_tells_those_that_change() -> None:
    losses = {"itc": torch.tensor(6.0), "mim": torch.tensor(8.0)}
    counts = {"itc": torch.tensor(3.0), "mim": torch.tensor(4.0)}
    result = StepResult(
        losses, counts, {"itc": 1.0, "mim": 0.25}, ("mim",), {}, 1.0, skipped=False, loss_scale=None, compute_s=0.0
    )
    metrics = Reporter(8, Requests(None), False, torch.device("cpu")).report(1, 0.1, [], result).metrics
    assert metrics["train/loss"] == pytest.approx(2.0 + 0.25 * 2.0)
    assert metrics["train/weight_mim"] == 0.25
    assert "train/weight_itc" not in metrics


def test_points_and_pairs_are_written_out_and_read_back() -> None:
    points = "[{from_step: 0, weight: 1}, {from_step: 9, weight: 0}]"
    config = run("objectives.more={kind: infonce, hub: image}", f"objectives.mim.weight={points}")
    assert parse_config(RunConfig, dump_yaml(config), "config.yaml") == config


def test_points_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="from_step 10 does not come after 20"):
        InfoNCEConfig(weight=(POINTS[1], POINTS[0]))


def test_a_weight_that_is_neither_number_nor_points_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.itc\.weight.*saw 'much' \(text\), expected a number or a list"):
        run("objectives.itc.weight=much")
