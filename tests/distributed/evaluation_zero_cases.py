"""One rank of the check that evaluating a partitioned model is right and leaves training alone.

Enter: a folder. Leaves, from rank 0: per ZeRO stage the losses of four steps and, but for the case without, the figures
of an evaluation between the second and the third.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from evaluation_cases import FOUR, OBJECTIVES, build_model, context_of, sounds_and_videos, tasks
from partitioned import engine_options
from tiny_model import rows_of

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import rank
from mmpretrain.core.types import Batch
from mmpretrain.training.engine import Engine

PARTS = [[[0, 1, 2], [3, 4], [5]], [[6, 7, 8, 9, 10]]]
"""Batches of each of the two ranks."""
CASES = {"zero2": (2, True), "zero3": (3, True), "zero3 without": (3, False)}
"""Weights are whole at ZeRO-2."""


def run_config(stage: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": 4,
            "precision": "fp32",
            "zero_stage": stage,
            "engine": engine_options(stage),
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "model": FOUR,
            "objectives": {name: objective.model_dump() for name, objective in OBJECTIVES.items()},
            "schedule": {"warmup": 0},
            "data": {
                "train": {"sources": {"main": {"shards": ["unused"]}}},
                "codecs": {name: {"kind": name} for name in ("image", "text", "audio", "video")},
            },
        }
    )


def train(engine: Engine, steps: int) -> list[dict[str, float]]:
    """This rank's summed losses of each step."""
    every = rows_of([5, 6, 7, 8, 9, 10, 5, 6]) | sounds_and_videos()
    rows = {name: value[rank() * 4 : rank() * 4 + 4] for name, value in every.items()}
    batches = [Batch(rows, ("a", "b", "c", "d"))]
    results = [engine.step(batches, 1e-3) for _ in range(steps)]
    return [{name: float(value) for name, value in result.losses.items()} for result in results]


def run_case(stage: int, evaluates: bool, folder: Path) -> dict[str, object]:
    config = run_config(stage)
    engine = Engine(build_model(config.objectives), config, torch.device("cpu"))
    losses, figures = train(engine, 2), dict[str, float]()
    if evaluates:
        context = replace(context_of(PARTS[rank()], folder / "run"), model=engine.model)
        engine.model.eval()
        for task in tasks(folder):
            figures |= task.run(context)
        engine.model.train()
    return {"losses": losses + train(engine, 2), "figures": figures}


def run_cases(folder: Path) -> None:
    found = {name: run_case(stage, evaluates, folder) for name, (stage, evaluates) in CASES.items()}
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
