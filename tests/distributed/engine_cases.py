"""One rank of the equality and elasticity checks; the tests beside it run these functions on every rank of a group.

Enter: a folder. Leave: per case, losses and full weights in the folder, written by rank 0.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from partitioned import engine_options
from safetensors.torch import save_file
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import rank, world_size
from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.seeding import row_key
from mmpretrain.core.types import Batch
from mmpretrain.models.config import resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.training import checkpoint
from mmpretrain.training.engine import Engine
from mmpretrain.training.fragments import KEYS
from mmpretrain.training.loss_scale import LossScale
from mmpretrain.training.manifest import Position
from mmpretrain.training.saving import begin
from mmpretrain.training.snapshot import Snapshot

GLOBAL_BATCH = 48
STEPS = 10
LR = 1e-3
IMAGE, LENGTH, VOCABULARY = 16, 10, 64

TOWER = {"kind": "native", "width": 32, "depth": 1, "heads": 4}
MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "towers": {
        "image": TOWER
        | {"stem": {"kind": "patches", "image_size": IMAGE, "patch_size": 4}, "pooling": "class", "pre_norm": True},
        "text": TOWER
        | {
            "stem": {
                "kind": "embeddings",
                "context_length": LENGTH,
                "vocab_size": VOCABULARY,
                "eos_id": 63,
                "mask_id": 2,
                "special_ids": [0, 1, 2, 62, 63],
            }
        },
    },
    "fusion": {"kind": "joint", "width": 32, "depth": 1, "heads": 4},
}
MLM = {"kind": "mlm", "condition_on": ["image"], "probability": 0.3, "weight": 0.5}
MAE = {"kind": "mae", "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4, "weight": 0.25}
OBJECTIVES = {
    "spanning": {"itc": {"kind": "infonce", "weight": 0.5}, "mlm": MLM},
    "rows": {"mlm": MLM, "mim": MAE},
    "features": {
        "itc": {"kind": "infonce", "weight": [{"from_step": 0, "weight": 1.0}, {"from_step": 2, "weight": 0.25}]},
        "itm": {"kind": "itm", "weight": 0.5},
        "seen": MAE | {"condition_on": ["text"]},
        "features": {
            "kind": "data2vec",
            "decoder_width": 32,
            "decoder_depth": 1,
            "decoder_heads": 4,
            "top_layers": 1,
            "decay_start": 0.5,
            "decay_end": 0.9,
            "decay_steps": 2,
        },
    },
    "caching": {
        "itc": {"kind": "infonce", "tile": 3},
        "ring": {"kind": "siglip", "tile": 3, "bias_init": -2.0},
        "gather": {"kind": "siglip", "tile": 5, "bias_init": -1.0, "implementation": "gather", "weight": 0.5},
    },
}
DROPPING = {"towers": MODEL["towers"] | {"image": MODEL["towers"]["image"] | {"patch_dropout": 0.5}}}
CACHING = {"model": {"embed_dim": 32} | DROPPING, "optimizer": {"lr": LR, "clip_grad_norm": 0.0}}
"""Contrasts alone, with half of the patches left out; the first moment after a step then is a tenth of the gradient."""

ACCUMULATIONS = {"spanning": [1, 2, 4], "rows": [4]}
"""Without accumulation the two kinds take the same way, and ranks differ in nothing but their number for `rows`."""
ROWS_RANKS = 2

OPTION_STEPS = 3
OPTIONS: dict[str, tuple[list[int], dict[str, object]]] = {
    "plain": ([0], {}),
    "checkpointing": ([1, 3], {"engine": {"activation_checkpointing": "block"}}),
    "offload": ([1, 2, 3], {"engine": {"offload": "optimizer"}}),
    "bf16": ([0, 1, 2, 3], {"precision": "bf16"}),
    "fp16": ([1, 2, 3], {"precision": "fp16"}),
    "muon": ([0, 1, 2, 3], {"optimizer": {"kind": "muon", "lr": LR, "weight_decay": 0.1, "eps": 1e-6}}),
}


def run_config(
    objectives: str, stage: int, micro: int, engine: Mapping[str, object] | None = None, **changes: object
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": STEPS,
            "precision": "fp32",
            "zero_stage": stage,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": micro,
            "engine": engine_options(stage, **(engine or {})),
            "model": MODEL,
            "objectives": OBJECTIVES[objectives],
            "optimizer": {"lr": LR, "clip_grad_norm": 1.0, "weight_decay": 0.1, "eps": 1e-6},
            "schedule": {"warmup": 0},
            "data": {
                "train": {"sources": {"main": {"shards": ["unused"]}}},
                "codecs": {"image": {"kind": "image"}, "text": {"kind": "text"}},
            },
        }
        | changes
    )


def build_model(config: RunConfig) -> MultimodalTransformer:
    torch.manual_seed(7)
    return MultimodalTransformer.create(resolve(config.model, None), config.objectives)


def row(position: int, lacking: bool = False) -> dict[str, Tensor]:
    """One sample as a function of its position, with texts of unequal length so that ranks hold unequal counts;
    `lacking`: every fifth counts as one without a text."""
    generator = torch.Generator().manual_seed(position)
    length = 3 + position % (LENGTH - 3)
    ids = torch.zeros(LENGTH, dtype=torch.int64)
    ids[:length] = torch.randint(3, 62, (length,), generator=generator)
    ids[0], ids[length - 1] = 1, 63
    return {
        "image": torch.randint(0, 256, (3, IMAGE, IMAGE), generator=generator, dtype=torch.uint8),
        "image.present": torch.tensor(True),
        "text": ids,
        "text.mask": torch.arange(LENGTH) < length,
        "text.present": torch.tensor(not lacking or position % 5 > 0),
        "position": torch.tensor(position),
        "sample": torch.tensor(position),
        "draw": torch.tensor(row_key(0, position)),
    }


def batch(positions: range, lacking: bool = False) -> Batch:
    rows = [row(position, lacking) for position in positions]
    tensors = {name: torch.stack([one[name] for one in rows]) for name in rows[0]}
    return Batch(tensors, tuple(map(str, positions)))


def micro_batches(config: RunConfig, step: int) -> list[Batch]:
    plan = BatchPlan(GLOBAL_BATCH, config.micro_batch_size, World(rank(), world_size()))
    return [batch(plan.micro_positions(step, index)) for index in range(plan.accumulation)]


def train(engine: Engine, steps: range) -> list[float]:
    """Weighted loss of each step over the global batch."""
    losses = []
    for step in steps:
        result = engine.step(micro_batches(engine.config, step), LR)
        sums = torch.stack([result.losses[name] for name in sorted(result.losses)])
        torch.distributed.all_reduce(sums)
        means = sums / torch.stack([result.counts[name] for name in sorted(result.counts)])
        weights = [result.weights[name] for name in sorted(result.losses)]
        losses.append(sum(weight * mean for weight, mean in zip(weights, means.tolist(), strict=True)))
    return losses


LEARNED = (*KEYS, "average")
EVERYTHING = (*LEARNED, "replica")
AVERAGED = {"ema": {"decay": 0.3}}


def full_state(engine: Engine, keys: tuple[str, ...] = EVERYTHING) -> dict[str, Tensor]:
    """Every fragment of every rank joined: "master/name", "exp_avg/name", "replica/name" of what does not learn, ... as
    flat tensors. Communicates."""
    mine = [
        (f"{one.key}/{one.name}", one.offset, one.view.detach().cpu().clone())
        for one in engine.fragments()
        if one.owned and one.key in keys
    ]
    gathered: list[list[tuple[str, int, Tensor]]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(gathered, mine)
    pieces = sorted((piece for part in gathered for piece in part), key=lambda piece: piece[:2])
    names = sorted({name for name, _, _ in pieces})
    return {name: torch.cat([view for other, _, view in pieces if other == name]) for name in names}


def engines(
    objectives: str, accumulations: list[int], stages: list[int], **changes: Any
) -> Iterator[tuple[str, Engine]]:
    for stage in stages:
        for accumulation in accumulations:
            micro = GLOBAL_BATCH // world_size() // accumulation
            config = run_config(objectives, stage, micro, **changes)
            engine = Engine(build_model(config), config, torch.device("cpu"))
            yield f"{objectives}-zero{stage}-ranks{world_size()}-accumulation{accumulation}", engine
            engine.deepspeed.destroy()


def leave_results(folder: Path, case: str, losses: list[float], state: dict[str, Tensor]) -> None:
    if rank() == 0:
        (folder / f"{case}.json").write_text(json.dumps(losses))
        save_file(state, folder / f"{case}.safetensors")


def equality(folder: Path) -> None:
    for objectives, accumulations in ACCUMULATIONS.items():
        if objectives == "rows" and world_size() != ROWS_RANKS:
            continue
        for case, engine in engines(objectives, accumulations, [0, 1, 2, 3]):
            losses = train(engine, range(STEPS))
            leave_results(folder, case, losses, full_state(engine))
    caching(folder)


def caching(folder: Path) -> None:
    """Losses and gradients of one step over rows of which some lack a text."""
    for case, engine in engines("caching", [1, 2, 4], [0, 1, 2, 3], **CACHING):
        plan = BatchPlan(GLOBAL_BATCH, engine.config.micro_batch_size, World(rank(), world_size()))
        result = engine.step([batch(plan.micro_positions(0, n), lacking=True) for n in range(plan.accumulation)], LR)
        sums = torch.stack([result.losses[name] / result.counts[name] for name in sorted(result.losses)])
        torch.distributed.all_reduce(sums)
        moments = full_state(engine, ("exp_avg",))
        leave_results(folder, case, sums.tolist(), {name: moment * 10 for name, moment in moments.items()})


def options(folder: Path) -> None:
    """Activation checkpointing and CPU offload change memory, not numbers; bf16 and fp16 round alike at all stages."""
    for name, (stages, changes) in OPTIONS.items():
        for case, engine in engines("spanning", [2], stages, **changes):
            losses = train(engine, range(OPTION_STEPS))
            state, samples = full_state(engine), OPTION_STEPS * GLOBAL_BATCH
            position = Position(OPTION_STEPS, samples, "d", loss_scale=engine.loss_scale)
            checkpoint.save(engine, folder / name / case, position, "seed: 0\n")
            restored = next(engines("spanning", [2], [engine.stage], **changes))[1]
            checkpoint.load(restored, folder / name / case)
            assert all(torch.equal(value, state[key]) for key, value in full_state(restored).items()), (name, case)
            assert restored.loss_scale == engine.loss_scale, (name, case)
            leave_results(folder, f"{name}-{case}", losses, state)
            if name == "muon" and engine.stage in (0, 3):
                refuses_another_optimizer(folder / name / case, folder / "plain", engine)
            if engine.loss_scale is not None:
                overflow(engine)


def refuses_another_optimizer(muons: Path, adamws: Path, engine: Engine) -> None:
    """Neither takes the other's moments for its own."""
    (adamws_checkpoint,) = adamws.iterdir()
    other = next(engines("spanning", [2], [engine.stage]))[1]
    for reader, checkpoints in ((other, muons), (engine, adamws_checkpoint)):
        with pytest.raises(CheckpointError, match=r"was trained by another optimizer .*; set optimizer\.kind to that"):
            checkpoint.load(reader, checkpoints)


def overflow(engine: Engine) -> None:
    """A scale at which fp16 gradients overflow costs a step on all ranks, and halves until it does no longer."""
    before, highest = full_state(engine), 2.0**26
    engine.loss_scale = LossScale(highest)
    batches = micro_batches(engine.config, OPTION_STEPS)
    assert engine.step(batches, LR).skipped and engine.loss_scale == LossScale(highest / 2)
    assert all(torch.equal(value, before[name]) for name, value in full_state(engine).items())
    while (result := engine.step(batches, LR)).skipped:
        assert result.loss_scale is not None and result.loss_scale > 2.0**16
    assert engine.loss_scale == LossScale(result.loss_scale, steps=1) and 0 < result.grad_norm < 100


def held_updates() -> None:
    """An update waits for who reads: until then nothing but buffers has changed, whatever the step does before."""
    for case, engine in engines("features", [2], [0, 2, 3], **AVERAGED):
        before, seen = full_state(engine, LEARNED), list[dict[str, Tensor]]()
        engine.hold_update(lambda engine=engine, seen=seen: seen.append(full_state(engine, LEARNED)))  # type: ignore[misc]
        train(engine, range(2))
        (found,) = seen
        assert all(torch.equal(value, found[name]) for name, value in before.items()), case
        after = full_state(engine, LEARNED)
        changed = {name.partition("/")[0] for name in after if not torch.equal(after[name], found[name])}
        assert changed == set(LEARNED), case


def write_checkpoint(folder: Path) -> None:
    """Five steps at these ranks and ZeRO-2, a checkpoint, and ten steps while it is written."""
    for _, engine in engines("spanning", [1], [2], **AVERAGED):
        train(engine, range(5))
        position = Position(step=5, samples=5 * GLOBAL_BATCH, data_hash="d")
        saving = begin(engine, Snapshot(), folder / "checkpoints", position, "seed: 0\n")
        state = full_state(engine)
        losses = train(engine, range(5, 15))
        assert checkpoint.find_newest_valid(folder / "checkpoints") == (None, None)
        saving.finish()
        leave_results(folder, "written", losses, state)


def read_checkpoint(folder: Path) -> None:
    for case, engine in engines("spanning", [1], [0, 1, 2, 3], **AVERAGED):
        train(engine, range(20, 22))  # weights and moments that the checkpoint must replace
        position = checkpoint.load(engine, folder / "checkpoints")
        assert position is not None and position.step == 5
        state = full_state(engine)
        leave_results(folder, f"read-{case}", train(engine, range(5, 15)), state)


def nan_on_one_rank(folder: Path) -> None:
    """Step 1 of three has a loss that is NaN on the last rank alone."""
    for objectives in ACCUMULATIONS:
        for case, engine in engines(objectives, [2], [0, 1, 2, 3]):
            train(engine, range(1))
            before = full_state(engine)
            tower = engine.model.towers["image"]
            poison = tower.register_forward_hook(lambda _module, _inputs, output: _poisoned(output))
            result = engine.step(micro_batches(engine.config, 1), LR)
            poison.remove()
            after = full_state(engine)
            unchanged = all(torch.equal(after[name], before[name]) for name in before)
            losses = train(engine, range(2, 3))
            moved = any(not torch.equal(value, after[name]) for name, value in full_state(engine).items())
            verdict = {"skipped": result.skipped, "unchanged": unchanged, "next": losses[0], "moved": moved}
            (folder / f"nan-{case}-rank{rank()}.json").write_text(json.dumps(verdict))


def teacher(folder: Path) -> None:
    """Train, save, restore at the next stage over weights that must give way, go on; then a step that is skipped."""
    for case, engine in engines("features", [2], [0, 1, 2, 3], **AVERAGED):
        losses = train(engine, range(3))
        state = full_state(engine, EVERYTHING)
        leave_results(folder, case, losses, state)
        checkpoint.save(engine, folder / case, Position(3, 3 * GLOBAL_BATCH, "d"), "seed: 0\n")
        other = next(engines("features", [2], [(engine.stage + 1) % 4], **AVERAGED))[1]
        train(other, range(20, 21))
        checkpoint.load(other, folder / case)
        restored = full_state(other, EVERYTHING)
        equal = all(torch.equal(value, state[name]) for name, value in restored.items()) and len(restored) == len(state)
        after, there = train(engine, range(3, 4)), train(other, range(3, 4))
        before = full_state(engine, ("replica", "average"))
        poison = engine.model.towers["image"].register_forward_hook(lambda _module, _inputs, output: _poisoned(output))
        skipped = engine.step(micro_batches(engine.config, 4), LR).skipped
        poison.remove()
        still = all(
            torch.equal(value, before[name]) for name, value in full_state(engine, ("replica", "average")).items()
        )
        verdict = {"equal": equal, "after": after, "there": there, "skipped": skipped, "still": still}
        (folder / f"verdict-{case}-rank{rank()}.json").write_text(json.dumps(verdict))


def _poisoned(output: dict[str, Tensor]) -> dict[str, Tensor]:
    if rank() != world_size() - 1:
        return output
    return output | {name: output[name] * float("nan") for name in ("tokens", "pooled")}
