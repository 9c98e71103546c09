"""How long commands and imports take to start, in fresh processes, beside torch alone and what its users import.

Enter: nothing, or `--rounds`. Leaves: a table and benchmarks/results/startup.json. Exits 1 when `mmpretrain --help`
takes half a second or more, or `import mmpretrain` more than a second beyond `import torch`.

Each round starts every process once, rounds alternate their order, and the figures are medians: CPU seconds of the
process, by which the targets are judged since other load does not count in them, and seconds on the clock. A first
round that is not counted fills the caches.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from machine import machine

HELP_S, BEYOND_TORCH_S = 0.5, 1.0
RECORD = Path(__file__).parent / "results" / "startup.json"
PROCESSES = {
    "python alone": "pass",
    "mmpretrain --help": "import sys; sys.argv = ['mmpretrain', '--help']; from mmpretrain.cli import main; main()",
    "import mmpretrain": "import mmpretrain",
    "import torch": "import torch",
    "our config": "import mmpretrain.config",
    "our model": "import mmpretrain.models.multimodal",
    "our trainer": "import mmpretrain.training.run",
    "transformers' CLIPModel": "from transformers import CLIPModel",
    "deepspeed": "import deepspeed",
    "open_clip": "import open_clip",
}


@dataclass(frozen=True)
class Started:
    """One process from start to end."""

    cpu_s: float
    wall_s: float


def start(statement: str) -> Started:
    """Run a statement in a fresh interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", statement], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{statement!r} ended with {process.returncode}")
    return Started(used.ru_utime + used.ru_stime, time.perf_counter() - begin)


def measure(rounds: int) -> dict[str, list[Started]]:
    """Every process once a round, in turns."""
    found: dict[str, list[Started]] = {name: [] for name in PROCESSES}
    for number in range(rounds + 1):
        for name in list(PROCESSES) if number % 2 == 0 else reversed(list(PROCESSES)):
            started = start(PROCESSES[name])
            if number:
                found[name].append(started)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", type=Path, default=RECORD)
    asked = parser.parse_args()
    found = measure(asked.rounds)
    cpu = {name: statistics.median(one.cpu_s for one in runs) for name, runs in found.items()}
    wall = {name: statistics.median(one.wall_s for one in runs) for name, runs in found.items()}
    print(f"{'':<24} {'CPU s':>7} {'wall s':>7} {'beyond torch':>13}")
    for name in PROCESSES:
        print(f"{name:<24} {cpu[name]:>7.2f} {wall[name]:>7.2f} {cpu[name] - cpu['import torch']:>+13.2f}")
    met = {
        "help": cpu["mmpretrain --help"] < HELP_S,
        "import": cpu["import mmpretrain"] <= cpu["import torch"] + BEYOND_TORCH_S,
    }
    record = {
        "machine": machine("torch", "transformers", "deepspeed", "open_clip_torch"),
        "rounds": asked.rounds,
        "median_cpu_s": cpu,
        "median_wall_s": wall,
        "all": {name: [vars(one) for one in runs] for name, runs in found.items()},
        "targets_met": met,
    }
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
