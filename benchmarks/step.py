"""CPU seconds of one contrastive training step, ours beside open_clip's: same architecture, weights, batch and tokens.

Enter: nothing, or `--cases` and `--precisions`. Leaves: a table and benchmarks/results/step.json. Exits 1 when the
first 8 losses differ, or when open_clip at its best takes less than `target` times as long as ours.

One process of one thread on one core. Each side does what a plain loop does between two batches: zero the gradients,
forward, loss, backward, optimizer. Ours starts from the bytes its loader delivers, open_clip from the normalised pixels
of its own. Rounds alternate the sides' order; the figure is the median CPU time. "engine" is ours through the trainer's
DeepSpeed engine (stage 0, with gradient norm and the guard against values that are not finite), "fused" is open_clip
with fused AdamW, for which its newest trainer has a flag. `--compiled` adds both sides compiled, whose first step takes
minutes; `--open-clip` takes a checkout of open_clip instead of the installed one.

    python benchmarks/step.py
    python benchmarks/step.py --cases vit-b-32 --open-clip ../open_clip/src --compiled
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from machine import machine, stay_on_one_core
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.config_engine import OptimizerConfig
from mmpretrain.core.types import Batch
from mmpretrain.layers.products import has_bf16_products
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.publishing.dual_encoder import dual_encoder
from mmpretrain.publishing.open_clip import open_clip_config, open_clip_state
from mmpretrain.training.compiling import compile_blocks
from mmpretrain.training.engine import Engine
from mmpretrain.training.optimizer import build_optimizer
from mmpretrain.training.ranks import join, leave

COMPARED, TOLERANCE = 8, {"fp32": 1e-5, "bf16": 2e-2}
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
OPTIMIZER = OptimizerConfig(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, clip_grad_norm=0.0)
PEERS = {"open_clip", "fused", "compiled"}
RECORD = Path(__file__).parent / "results" / "step.json"

CPU = torch.device("cpu")

Step = Callable[[], Tensor]
"""One step on the next batch; returns its loss, []."""


@dataclass(frozen=True)
class Case:
    """One architecture and batch."""

    image: dict[str, object]
    text: dict[str, object]
    image_size: int
    patch_size: int
    context: int
    vocabulary: int
    embed_dim: int
    batch: int
    words: tuple[int, int]
    """Tokens of the shortest and the longest text."""
    target: float
    """How many times as long open_clip at its best must take."""

    def model(self) -> MultimodalTransformer:
        towers = {
            "image": self.image
            | {"kind": "native", "pooling": "class", "pre_norm": True}
            | {"stem": {"kind": "patches", "image_size": self.image_size, "patch_size": self.patch_size}},
            "text": self.text
            | {"kind": "native", "pooling": "eos", "causal": True}
            | {"stem": {"kind": "embeddings", "context_length": self.context, "vocab_size": self.vocabulary}},
        }
        towers["text"]["stem"] |= {"eos_id": self.vocabulary - 1}
        torch.manual_seed(0)
        config = ModelConfig.model_validate({"embed_dim": self.embed_dim, "towers": towers})
        return MultimodalTransformer.create(config, {"itc": InfoNCEConfig()}).train()

    def rows(self, number: int) -> dict[str, Tensor]:
        """A batch of random pictures, and texts of random words."""
        generator = torch.Generator().manual_seed(number)
        size = (self.batch, 3, self.image_size, self.image_size)
        shortest, longest = self.words
        lengths = torch.randint(shortest - 1, longest, (self.batch, 1), generator=generator)
        places = torch.arange(self.context)[None]
        words = torch.randint(1, self.vocabulary - 1, (self.batch, self.context), generator=generator)
        ended = torch.where(places == lengths, self.vocabulary - 1, words)
        return {
            "image": torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
            "image.present": torch.ones(self.batch, dtype=torch.bool),
            "text": torch.where(places > lengths, 0, ended),
            "text.mask": places <= lengths,
            "text.present": torch.ones(self.batch, dtype=torch.bool),
        }


CASES = {
    "small": Case(
        image={"width": 256, "depth": 6, "heads": 4},
        text={"width": 256, "depth": 6, "heads": 4},
        image_size=112,
        patch_size=16,
        context=32,
        vocabulary=8192,
        embed_dim=256,
        batch=64,
        words=(5, 32),
        target=1.0,
    ),
    "vit-b-32": Case(
        image={"width": 768, "depth": 12, "heads": 12},
        text={"width": 512, "depth": 12, "heads": 8},
        image_size=224,
        patch_size=32,
        context=77,
        vocabulary=49408,
        embed_dim=512,
        batch=16,
        words=(8, 24),
        target=1.3,
    ),
}


def our_step(case: Case, precision: str, compiled: bool = False, device: torch.device = CPU) -> Step:
    model = case.model().to(device)
    if compiled:
        compile_blocks(model, None, device)
    batches = itertools.cycle([case.rows(number) for number in range(COMPARED)])
    model.autocast_dtype = PRECISIONS[precision]
    optimizer = build_optimizer(model, OPTIMIZER, zero_stage=1)
    scales = {"itc": torch.tensor(1 / case.batch, device=device)}

    def step() -> Tensor:
        optimizer.zero_grad()
        rows = {name: part.to(device, non_blocking=True) for name, part in model.trimmed(next(batches)).items()}
        loss: Tensor = model([rows], scales)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def run_config(
    case: Case, model: MultimodalTransformer, precision: str, stage: int, optimizer: OptimizerConfig
) -> RunConfig:
    """What the trainer's engine needs to know of a run on one rank."""
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": 1,
            "precision": precision,
            "zero_stage": stage,
            "global_batch_size": case.batch,
            "micro_batch_size": case.batch,
            "model": model.config.model,
            "objectives": model.config.objectives,
            "optimizer": optimizer.model_dump(),
            "schedule": {"warmup": 0},
            "data": {"train": {"sources": {"main": {"shards": ["unused"]}}}},
        }
    )


def engine_step(
    case: Case, precision: str, stage: int = 0, optimizer: OptimizerConfig = OPTIMIZER, device: torch.device = CPU
) -> Step:
    """Our step as the trainer takes it."""
    model = case.model()
    join()
    engine = Engine(model.to(device), run_config(case, model, precision, stage, optimizer), device)
    batches = itertools.cycle([Batch(case.rows(number), keys=()) for number in range(COMPARED)])

    def step() -> Tensor:
        result = engine.step([next(batches)], optimizer.lr)
        return result.losses["itc"] / result.counts["itc"]

    return step


def peer_step(case: Case, precision: str, fused: bool, compiled: bool = False, device: torch.device = CPU) -> Step:
    """open_clip_train's step: its groups, its loss, its clamp of the logit scale."""
    import open_clip  # not before it is known which

    ours = case.model()
    pair = dual_encoder(ours)
    model = open_clip.CLIP(**open_clip_config(pair, has_tokenizer=False)["model_cfg"], output_dict=True).train()
    model.load_state_dict(open_clip_state(pair), strict=False)
    model.to(device)
    forward = torch.compile(model) if compiled else model
    batches = itertools.cycle([_peer_batch(ours, case, number) for number in range(COMPARED)])
    dtype = PRECISIONS[precision]
    loss_function = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(
        _peer_groups(model), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=fused or None
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        rows = [part.to(device, non_blocking=True) for part in next(batches)]
        with contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
            loss: Tensor = loss_function(**forward(*rows))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.605170185988092)
        return loss.detach()

    return step


def _peer_batch(ours: MultimodalTransformer, case: Case, number: int) -> tuple[Tensor, Tensor]:
    """The same batch as normalised pictures and ids."""
    rows = case.rows(number)
    patches = ours.towers["image"].patches(rows["image"])
    grid, patch = case.image_size // case.patch_size, case.patch_size
    tiles = patches.view(case.batch, grid, grid, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(case.batch, 3, case.image_size, case.image_size), rows["text"]


def _peer_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """As in open_clip_train.main: gains, biases and the logit scale do not decay."""
    bare = {
        name: p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        for name, p in model.named_parameters()
    }
    return [
        {"params": [p for name, p in model.named_parameters() if bare[name]], "weight_decay": 0.0},
        {
            "params": [p for name, p in model.named_parameters() if not bare[name]],
            "weight_decay": OPTIMIZER.weight_decay,
        },
    ]


def measure(name: str, precision: str, rounds: int, compiled: bool, batch: int | None) -> dict[str, object]:
    """Compare the first losses, then time the sides in turns."""
    case = CASES[name] if batch is None else replace(CASES[name], batch=batch)
    steps = {
        "ours": our_step(case, precision),
        "engine": engine_step(case, precision),
        "open_clip": peer_step(case, precision, fused=False),
        "fused": peer_step(case, precision, fused=True),
    }
    if compiled:
        steps["ours_compiled"] = our_step(case, precision, compiled=True)
        steps["compiled"] = peer_step(case, precision, fused=True, compiled=True)
    ours, peers = steps.keys() - PEERS, steps.keys() & PEERS
    losses = {side: [step().item() for _ in range(COMPARED)] for side, step in steps.items()}
    expected = losses["open_clip"]
    difference = max(abs(a - b) for side in ours for a, b in zip(losses[side], expected, strict=True))
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(rounds):
        for side in list(steps) if number % 2 == 0 else reversed(list(steps)):
            started = time.process_time()
            steps[side]()
            seconds[side].append(time.process_time() - started)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    best = min(peers, key=lambda side: medians[side])
    return {
        "case": name,
        "precision": precision,
        "batch": case.batch,
        "losses": losses,
        "largest_loss_difference": difference,
        "cpu_s": {side: {"median": medians[side], "all": seconds[side]} for side in steps},
        "best_peer": best,
        "best_peer_over": {side: medians[best] / medians[side] for side in sorted(ours)},
        "losses_agree": difference <= TOLERANCE[precision],
        "target": case.target,
        "target_met": medians[best] >= case.target * min(medians[side] for side in ours),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, help="samples of a step, other than the case's own")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--compiled", action="store_true", help="both sides compiled as well")
    parser.add_argument("--open-clip", type=Path, help="the src folder of a checkout, to use instead of the installed")
    asked = parser.parse_args()
    if asked.open_clip is not None:
        sys.path.insert(0, str(asked.open_clip))
    stay_on_one_core()
    results = []
    for name in asked.cases:
        for precision in asked.precisions:
            result = measure(name, precision, asked.rounds, asked.compiled, asked.batch)
            results.append(result)
            print(_line(result), flush=True)
    leave()
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(json.dumps({"machine": _about(), "results": results}, indent=1) + "\n")
    return 0 if all(result["losses_agree"] and result["target_met"] for result in results) else 1


def _line(result: dict) -> str:
    seconds = "  ".join(f"{side} {entry['median']:.3f} s" for side, entry in result["cpu_s"].items())
    ratios = ", ".join(f"{side} {ratio:.3f}" for side, ratio in result["best_peer_over"].items())
    return (
        f"{result['case']} {result['precision']}: {seconds}; {result['best_peer']} takes times as long as {ratios}; "
        f"losses differ by {result['largest_loss_difference']:.1e}"
    )


def _about() -> dict[str, object]:
    import open_clip

    about = machine("torch", "transformers", "deepspeed")
    return about | {"open_clip": open_clip.__version__, "has_bf16_products": has_bf16_products()}


if __name__ == "__main__":
    raise SystemExit(main())
