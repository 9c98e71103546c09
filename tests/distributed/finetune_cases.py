"""One rank of the fine-tuning checks, which test_finetuning.py runs on every rank of a group.

Enter: a folder. Leave: per case and ZeRO stage, losses and the full state after them; and whether a checkpoint of each
brought an engine of another stage, built on other weights, to the same state and the same next loss.
"""

import json
from pathlib import Path

import engine_cases
import torch
from engine_cases import GLOBAL_BATCH, full_state, leave_results, run_config, train
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import rank, world_size
from mmpretrain.models.config import resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.trained_parts import prepare
from mmpretrain.training import checkpoint
from mmpretrain.training.engine import Engine
from mmpretrain.training.manifest import Position

STEPS = 2
TOWERS = {name: tower | {"depth": 2} for name, tower in engine_cases.MODEL["towers"].items()}
MODEL = engine_cases.MODEL | {"towers": TOWERS}
"""Towers of two blocks, so that the last is not the only one."""
CASES: dict[str, dict[str, object]] = {
    "whole": {"layer_decay": 0.5},
    "last-block": {"train": 1, "layer_decay": 0.5},
    "heads": {"train": "heads"},
    "locked": {"towers": {"image": "frozen"}},
    "lora": {"lora": {"rank": 2, "alpha": 4, "targets": ["attention", "mlp"]}},
}
STAGES = {"whole": (2, 3), "last-block": (2, 3), "heads": (2, 3), "locked": (2, 3), "lora": (0, 1, 2, 3)}
RESTORED = ("last-block", "lora")
"""Cases whose checkpoints are read again, each by another stage."""
PAIRS = [(case, stage) for case, stages in STAGES.items() for stage in stages]


def config_of(case: str, stage: int, micro: int) -> RunConfig:
    return run_config("spanning", stage, micro, model=MODEL, finetune=CASES[case], steps=STEPS)


def build(config: RunConfig, seed: int = 7) -> MultimodalTransformer:
    """What a run has after it took over weights: all drawn from the seed, adapters with an effect of their own."""
    assert config.finetune is not None
    torch.manual_seed(seed)
    model = MultimodalTransformer.create(resolve(config.model, None), config.objectives)
    prepare(model, config.finetune)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def check(case: str, stage: int, folder: Path) -> None:
    config = config_of(case, stage, GLOBAL_BATCH // world_size())
    engine = Engine(build(config), config, torch.device("cpu"))
    losses = train(engine, range(STEPS))
    state, name = full_state(engine), f"{case}-zero{stage}"
    leave_results(folder, name, losses, state)
    if case in RESTORED:
        checkpoint.save(engine, folder / name, Position(STEPS, STEPS * GLOBAL_BATCH, "d"), "seed: 0\n")
        check_restored(case, folder / name, state, train(engine, range(STEPS, STEPS + 1)))
    engine.deepspeed.destroy()


def check_restored(case: str, saved: Path, state: dict[str, Tensor], following: list[float]) -> None:
    """Load into an engine of another stage, and take the step that followed."""
    stages = STAGES[case]
    stage = stages[stages.index(int(saved.name[-1])) - 1]
    config = config_of(case, stage, GLOBAL_BATCH // world_size())
    engine = Engine(build(config, seed=8), config, torch.device("cpu"))
    checkpoint.load(engine, saved)
    found = full_state(engine)
    verdict = {
        "names": sorted(set(found) ^ set(state)),
        "changed": sorted(key for key in state if not torch.equal(found[key], state[key])),
        "next": [*following, *train(engine, range(STEPS, STEPS + 1))],
    }
    engine.deepspeed.destroy()
    if rank() == 0:
        saved.with_suffix(".restored.json").write_text(json.dumps(verdict))


def check_all(folder: Path) -> None:
    for case, stage in PAIRS:
        check(case, stage, folder)
