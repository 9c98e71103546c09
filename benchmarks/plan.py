"""The planner's forecast of a step beside what 1, 2 and 4 ranks take on gloo, on this machine.

Enter: nothing. Leaves: a table and benchmarks/results/plan.json. Exits 1 when a forecast is off by more than 15 %.

Three things are measured for a forecast of N ranks: the step of one rank alone; how much longer the same computation
takes where N processes do it at once and send nothing, as they share cores and memory; and how long each kind of
collective takes at a few sizes, as nccl-tests does. The forecast is the step of one rank, so much longer, and the
plan's own list of messages at those bandwidths. Within a launch the calls alternate, so that other load meets them all.

    python benchmarks/plan.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import barrier, rank, world_size
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import Batch
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.planning.communication import Bandwidth, Network, crossings, messages
from mmpretrain.planning.memory import setting_of
from mmpretrain.planning.workload import Workload, measure
from mmpretrain.training.engine import Engine
from mmpretrain.training.optimizer import build_optimizer
from mmpretrain.training.parts import batch_fields
from mmpretrain.training.ranks import join, leave

RANKS = (1, 2, 4)
STAGES = (0, 1)
ROWS = 32
"""Of each rank in a step, whatever the ranks."""
SIZES = (2**14, 2**18, 2**21, 2**24, 2**26)
SILENT = "computation alone"
ROUNDS, STEPS = 3, 4
TOLERANCE = 0.15
RECORD = Path(__file__).parent / "results" / "plan.json"


def run_config(ranks: int, stage: int) -> RunConfig:
    """Two towers and InfoNCE: 16 million parameters, so that communication weighs."""
    tower = {"kind": "native", "width": 320, "depth": 6, "heads": 5}
    image = tower | {"pooling": "class", "stem": {"kind": "patches", "image_size": 64, "patch_size": 16}}
    text = tower | {"pooling": "mean", "stem": {"kind": "embeddings", "context_length": 16, "vocab_size": 4096}}
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": 1,
            "precision": "fp32",
            "zero_stage": stage,
            "global_batch_size": ROWS * ranks,
            "micro_batch_size": ROWS,
            "model": {"embed_dim": 320, "towers": {"image": image, "text": text}},
            "objectives": {"itc": {"kind": "infonce"}},
            "data": {"train": {"sources": {"main": {"shards": ["unused"]}}}, "tokenizer": {"train_vocab_size": 4096}},
            "schedule": {"warmup": 0},
        }
    )


def measure_here() -> None:
    """As one rank: time steps and collectives in turn; the main rank prints them as JSON."""
    torch.set_num_threads(1)
    join()
    steps = {stage: step_of(run_config(world_size(), stage)) for stage in STAGES}
    collectives = collective_calls() if world_size() > 1 else {}
    calls: dict[str, Callable[[], object]] = {f"stage {stage}": step for stage, step in steps.items()}
    calls |= collectives | {SILENT: silent_step(run_config(world_size(), 0))}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name] += [timed(call) for _ in range(STEPS)]
    if rank() == 0:
        print(json.dumps({name: statistics.median(found) for name, found in times.items()}))
    leave()


def step_of(config: RunConfig) -> Callable[[], object]:
    torch.manual_seed(0)
    model = MultimodalTransformer.create(config.model, config.objectives)
    engine = Engine(model, config, torch.device("cpu"))
    batch = Batch(random_rows(config), keys=())
    return lambda: engine.step([batch], 1e-4)


def silent_step(config: RunConfig) -> Callable[[], object]:
    """Towers forward and backward and the update, which send nothing."""
    model = MultimodalTransformer.create(config.model, config.objectives).train()
    optimizer, rows = build_optimizer(model, config.optimizer, zero_stage=1), random_rows(config)

    def step() -> None:
        parts = [part for part in model.encode(rows).values() if part.requires_grad]
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_rows(config: RunConfig) -> dict[str, Tensor]:
    """A micro-batch in which every row holds everything."""
    rows = {}
    for name, spec in batch_fields(config, config.model).items():
        dtype = getattr(torch, spec.dtype)
        filled = torch.ones if dtype == torch.bool else torch.empty
        rows[name] = filled((ROWS, *spec.shape), dtype=dtype)
        if dtype != torch.bool:
            rows[name].random_(0, 200)
    return rows


def collective_calls() -> dict[str, Callable[[], object]]:
    """Every kind at every size, as "<kind> <bytes>"."""
    calls: dict[str, Callable[[], object]] = {}
    for size in SIZES:
        whole = torch.zeros(size // 4)
        share = torch.zeros(size // 4 // world_size())
        calls[f"all_reduce {size}"] = partial(dist.all_reduce, whole)
        calls[f"all_gather {size}"] = partial(dist.all_gather_into_tensor, whole, share)
        calls[f"reduce_scatter {size}"] = partial(dist.reduce_scatter_tensor, share, whole)
    return calls


def timed(call: Callable[[], object]) -> float:
    barrier()
    start = time.perf_counter()
    call()
    barrier()
    return time.perf_counter() - start


def network_of(times: dict[str, float], ranks: int) -> Network:
    """Bus bandwidth of each kind at each size."""

    def bandwidth(kind: str) -> Bandwidth:
        rates = [crossings(kind, ranks) * size / times[f"{kind} {size}"] for size in SIZES]
        return Bandwidth(tuple(map(float, SIZES)), tuple(rates))

    return Network(bandwidth("all_reduce"), bandwidth("all_gather"), bandwidth("reduce_scatter"))


def communication(workload: Workload, config: RunConfig, network: Network, ranks: int) -> float:
    sent = messages(workload, setting_of(config, ranks))
    return sum(message.count * network.seconds(message.collective, ranks) for message in sent)


def forecasts(times: dict[int, dict[str, float]]) -> list[dict[str, float]]:
    """One row for each number of ranks above 1 and each stage."""
    rows = []
    for ranks in RANKS[1:]:
        network = network_of(times[ranks], ranks)
        workload = measure(run_config(ranks, 0), BatchPlan(ROWS * ranks, ROWS, World(0, ranks)), "cpu")
        shared = times[ranks][SILENT] / times[1][SILENT]
        for stage in STAGES:
            alone, taken = times[1][f"stage {stage}"], times[ranks][f"stage {stage}"]
            sent = communication(workload, run_config(ranks, stage), network, ranks)
            forecast = alone * shared + sent
            row = {"ranks": ranks, "stage": stage, "one rank": alone, "times": shared, "communication": sent}
            rows.append(row | {"forecast": forecast, "measured": taken, "error": forecast / taken - 1})
    return rows


def measure_apart(ranks: int) -> dict[str, float]:
    """`measure_here` on so many ranks of a fresh launch."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *launch, __file__, "--rank"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORD, help="where the JSON record goes")
    parser.add_argument("--rank", action="store_true", help="measure as one rank of a launch")
    arguments = parser.parse_args()
    if arguments.rank:
        measure_here()
        return 0
    load = os.getloadavg()[0]
    times = {ranks: measure_apart(ranks) for ranks in RANKS}
    rows = forecasts(times)
    for row in rows:
        print("  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    about = {
        "command": "python benchmarks/plan.py",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "load": load,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(about | {"rows": rows, "times": times}, indent=1) + "\n")
    return 1 if any(abs(row["error"]) > TOLERANCE for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
