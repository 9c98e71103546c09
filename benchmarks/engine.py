"""CPU seconds of one training step through our DeepSpeed engine, beside the same model in PyTorch's own DDP.

Enter: nothing, or `--cases`, `--precisions` and `--stages`. Leaves: a table and benchmarks/results/engine.json. Exits 1
when the first 8 losses differ, or when DDP takes less than 0.95 times as long as the engine at stage 0.

One rank of gloo with one thread on one core. Both sides start from the same weights and get the same batches. DDP is
what a plain loop does: trim the texts, zero the gradients, forward, backward with its buckets reduced, clip the norm,
fused AdamW. The engine does the same and what our trainer promises beyond it: losses as sums over counts of the global
batch, and no update where a gradient is not finite. Rounds alternate the sides' order; the figure is the median.

    python benchmarks/engine.py
    python benchmarks/engine.py --cases small --precisions fp32 --stages 0 1 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine, stay_on_one_core
from step import CASES, COMPARED, PRECISIONS, TOLERANCE, Case, Step, engine_step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmpretrain.config_engine import OptimizerConfig
from mmpretrain.layers.products import has_bf16_products
from mmpretrain.training.optimizer import parameter_groups
from mmpretrain.training.ranks import join, leave

TARGET, TARGET_STAGE = 0.95, 0
OPTIMIZER = OptimizerConfig(lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, clip_grad_norm=1.0)
RECORD = Path(__file__).parent / "results" / "engine.json"


def ddp_step(case: Case, precision: str) -> Step:
    """A plain loop around the same model."""
    model = case.model()
    model.autocast_dtype = PRECISIONS[precision]
    replicated = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, OPTIMIZER.weight_decay),  # type: ignore[arg-type]
        lr=OPTIMIZER.lr,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        fused=True,
    )
    batches = itertools.cycle([case.rows(number) for number in range(COMPARED)])
    scales = {"itc": torch.tensor(1 / case.batch)}

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = replicated([model.trimmed(next(batches))], scales)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad_norm)
        optimizer.step()
        return loss.detach()

    return step


def measure(name: str, precision: str, stages: list[int], rounds: int) -> dict[str, object]:
    """Compare the first losses, then time the sides in turns."""
    case = CASES[name]
    steps = {"ddp": ddp_step(case, precision)} | {
        f"stage {stage}": engine_step(case, precision, stage, OPTIMIZER) for stage in stages
    }
    losses = {side: [step().item() for _ in range(COMPARED)] for side, step in steps.items()}
    difference = max(abs(a - b) for own in losses.values() for a, b in zip(own, losses["ddp"], strict=True))
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(rounds):
        for side in list(steps) if number % 2 == 0 else reversed(list(steps)):
            started = time.process_time()
            steps[side]()
            seconds[side].append(time.process_time() - started)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ratios = {side: medians["ddp"] / median for side, median in medians.items() if side != "ddp"}
    judged = ratios.get(f"stage {TARGET_STAGE}")
    return {
        "case": name,
        "precision": precision,
        "batch": case.batch,
        "losses": losses,
        "largest_loss_difference": difference,
        "losses_agree": difference <= TOLERANCE[precision],
        "cpu_s": {side: {"median": medians[side], "all": seconds[side]} for side in steps},
        "ddp_over": ratios,
        "target": TARGET,
        "target_met": judged is None or judged >= TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["small"], choices=list(CASES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2], choices=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--record", type=Path, default=RECORD)
    asked = parser.parse_args()
    stay_on_one_core()
    join()
    results = []
    for name, precision in itertools.product(asked.cases, asked.precisions):
        result = measure(name, precision, asked.stages, asked.rounds)
        results.append(result)
        print(_line(result), flush=True)
    leave()
    about = machine("torch", "transformers", "deepspeed") | {"has_bf16_products": has_bf16_products()}
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    return 0 if all(result["losses_agree"] and result["target_met"] for result in results) else 1


def _line(result: dict) -> str:
    seconds = "  ".join(f"{side} {entry['median']:.3f} s" for side, entry in result["cpu_s"].items())
    ratios = ", ".join(f"{side} {ratio:.3f}" for side, ratio in result["ddp_over"].items())
    return (
        f"{result['case']} {result['precision']} batch {result['batch']}: {seconds}; DDP takes times as long as "
        f"{ratios}; losses differ by {result['largest_loss_difference']:.1e}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
