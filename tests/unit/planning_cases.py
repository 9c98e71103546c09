"""Runs small enough to be measured for real, and what a step of each takes here, for the tests of the planner.

Called as a script it takes real steps through the engine, under PyTorch's own record of what its CPU allocator gives
out, and prints bytes as JSON: a process of its own, in which nothing else allocates.
"""

import gc
import json
import sys

import torch
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import Batch
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.training.parts import batch_fields

BUCKET = 1_000_000
WORDS = 4000
CONTRAST = {"itc": {"kind": "infonce"}}
MASKED = {"mlm": {"kind": "mlm"}, "mim": {"kind": "mae", "decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}}
CASES: dict[str, dict[str, object]] = {
    "stage 0": {"zero_stage": 0},
    "stage 1, activations computed twice": {"zero_stage": 1, "engine.activation_checkpointing": "block"},
    "stage 1, products kept, averaged": {
        "zero_stage": 1,
        "engine.activation_checkpointing": "selective",
        "ema": {"decay": 0.9},
    },
    "stage 2, bf16, three chunks before one loss": {"zero_stage": 2, "precision": "bf16", "global_batch_size": 48},
    "stage 2, three micro-batches accumulated": {"zero_stage": 2, "global_batch_size": 48, "objectives": MASKED},
}


def case(name: str) -> RunConfig:
    """A picture and a text tower, 16 rows at a time; gradients are reduced a million at once."""
    tower = {"kind": "native", "width": 192, "depth": 2, "heads": 3}
    image = tower | {"pooling": "class", "stem": {"kind": "patches", "image_size": 64, "patch_size": 8}}
    text = tower | {"pooling": "mean", "stem": {"kind": "embeddings", "context_length": 32}}
    changes = dict(CASES[name])
    stage = changes["zero_stage"]
    engine = {
        "activation_checkpointing": changes.pop("engine.activation_checkpointing", "none"),
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": BUCKET}} if stage else {},
    }
    fields = {
        "output": "unused",
        "steps": 1,
        "precision": "fp32",
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "model": {"embed_dim": 192, "towers": {"image": image, "text": text}},
        "objectives": CONTRAST,
        "engine": engine,
        "data": {"tokenizer": {"train_vocab_size": WORDS}, "train": {"sources": {"main": {"shards": ["unused"]}}}},
        "schedule": {"warmup": 0},
    }
    return RunConfig.model_validate(fields | changes)


def rows(config: RunConfig, model: MultimodalTransformer, seed: int = 0) -> dict[str, Tensor]:
    """A micro-batch of ids and pixels in which every row holds everything."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in batch_fields(config, model.config.parsed_model()).items():
        shape = (config.micro_batch_size, *spec.shape)
        if spec.dtype == "bool":
            made[name] = torch.ones(shape, dtype=torch.bool)
        else:
            made[name] = torch.randint(3, spec.below or 100, shape, generator=generator).to(getattr(torch, spec.dtype))
    for name in ("position", "draw", "sample"):
        made[name] = torch.arange(config.micro_batch_size) + 1000 * seed
    return made


def allocated_at_the_peak(config: RunConfig) -> int:
    """Most bytes that PyTorch's allocator had given out at once in the second of two steps."""
    from mmpretrain.planning.stand_ins import resolve_model
    from mmpretrain.training.engine import Engine

    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = MultimodalTransformer.create(resolve_model(config).config, config.objectives)
        engine = Engine(model, config, torch.device("cpu"))
        chunks = config.global_batch_size // config.micro_batch_size
        batches = [Batch(rows(config, model, seed), keys=()) for seed in range(chunks)]
        engine.step(batches, 1e-4)
        with torch.profiler.record_function("the second step"):
            engine.step(batches, 1e-4)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "the second step")
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held) if event.start_ns() >= start else held
    return peak


def alone(config: RunConfig) -> BatchPlan:
    return BatchPlan(config.global_batch_size, config.micro_batch_size, World())


if __name__ == "__main__":
    from mmpretrain.training.ranks import join

    join()
    sys.stdout.write(json.dumps({name: allocated_at_the_peak(case(name)) for name in sys.argv[1:]}) + "\n")
