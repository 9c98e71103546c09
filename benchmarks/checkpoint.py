"""What a checkpoint costs training: the stall of a save beside it, as a share of a save that is waited for.

Enter: nothing. Leaves: a table and benchmarks/results/checkpoint.json. Exits 1 when the stall is more than 10 % of the
save that is waited for, or when both leave different bytes.

One process of one thread trains through the trainer's engine (ZeRO-1: fp32 masters and both moments), with the writer
on the other cores, as in a run. Each round, in alternating order: a save that is waited for, from the call until the
checkpoint is valid, fsynced; and a save beside training: its call, the steps until the file is on disk, the call that
makes it valid. The stall is the time of both calls, and what those steps took beyond the mean of as many before and as
many after. Batches are small, so that a step takes hardly longer than a save.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --case small --rounds 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from machine import machine
from step import CASES, OPTIMIZER, Case, run_config

from mmpretrain.core.types import Batch
from mmpretrain.training.engine import Engine
from mmpretrain.training.manifest import Position, read_manifest
from mmpretrain.training.ranks import join, leave
from mmpretrain.training.saving import Saving, begin
from mmpretrain.training.snapshot import Snapshot

HIGHEST_SHARE = 0.1
RECORD = Path(__file__).parent / "results" / "checkpoint.json"
PLAIN_STEPS = 3
"""Before a save beside training, and as many after it, while nothing is written."""
BATCH = 2


@dataclass(frozen=True)
class Round:
    """Seconds."""

    plain_step: float
    """Mean of the steps around the save beside training, while nothing was written."""
    at_once: float
    """The save that is waited for."""
    calls: float
    """Of the save beside training: the time in which no step can run."""
    steps_meanwhile: list[float]
    slowed: float
    """What these steps took beyond as many plain ones."""

    @property
    def stall(self) -> float:
        return self.calls + self.slowed


class Trainer:
    """Trains and saves; every checkpoint is deleted once its size and digest are known."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.folder, self.snapshot = folder, Snapshot()
        model = case.model()
        self.engine = Engine(model, run_config(case, model, "fp32", 1, OPTIMIZER), torch.device("cpu"))
        self.batches = itertools.cycle([Batch(case.rows(number), keys=()) for number in range(4)])
        self.file = (0, "")
        """Size and SHA-256 of the newest file."""

    def step(self) -> float:
        return _seconds(lambda: self.engine.step([next(self.batches)], OPTIMIZER.lr))

    def steps(self, number: int) -> list[float]:
        return [self.step() for _ in range(number)]

    def begin(self) -> Saving:
        return begin(self.engine, self.snapshot, self.folder, Position(1, 1, "benchmark"), "benchmark: true\n")

    def tidy(self) -> None:
        (path,) = self.folder.iterdir()
        self.file = read_manifest(path).files["rank-00000.safetensors"]
        shutil.rmtree(path)

    def save_at_once(self) -> float:
        seconds = _seconds(lambda: self.begin().finish())
        self.tidy()
        return seconds

    def save_beside(self) -> tuple[float, list[float]]:
        """Seconds of both calls, and of each step between them."""
        begun = time.perf_counter()
        saving = self.begin()
        calls, steps = time.perf_counter() - begun, []
        while not saving.is_written:
            steps.append(self.step())
        calls += _seconds(saving.finish)
        self.tidy()
        return calls, steps


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def measure(trainer: Trainer, number: int) -> Round:
    """One round; odd ones save beside training first."""
    at_once = trainer.save_at_once() if number % 2 == 0 else None
    before = trainer.steps(PLAIN_STEPS)
    calls, steps = trainer.save_beside()
    plain = statistics.mean(before + trainer.steps(PLAIN_STEPS))
    if at_once is None:
        at_once = trainer.save_at_once()
    return Round(plain, at_once, calls, steps, sum(steps) - len(steps) * plain)


def same_bytes(trainer: Trainer) -> bool:
    """Whether both ways write the same file for the same state, with no step between begin and end."""
    trainer.save_at_once()
    before = trainer.file
    saving = trainer.begin()
    while not saving.is_written:
        time.sleep(0.01)
    saving.finish()
    trainer.tidy()
    return before == trainer.file


def summary(name: str, trainer: Trainer, rounds: list[Round]) -> dict[str, object]:
    at_once = statistics.median(one.at_once for one in rounds)
    stall, calls = (statistics.median(getattr(one, field) for one in rounds) for field in ("stall", "calls"))
    return {
        "case": name,
        "bytes": trainer.file[0],
        "at_once_s": at_once,
        "gb_per_s_at_once": trainer.file[0] / 1e9 / at_once,
        "stall_s": stall,
        "calls_s": calls,
        "share": stall / at_once,
        "share_of_calls": calls / at_once,
        "shares": [one.stall / one.at_once for one in rounds],
        "target": HIGHEST_SHARE,
        "rounds": [asdict(one) for one in rounds],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="vit-b-32", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk to write to")
    parser.add_argument("--record", type=Path, default=RECORD)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    join()
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        trainer = Trainer(replace(CASES[asked.case], batch=BATCH), Path(folder))
        trainer.step()
        equal = same_bytes(trainer)  # which allocates the memory, as the first save of a run does
        rounds = [measure(trainer, number) for number in range(asked.rounds)]
        found = summary(asked.case, trainer, rounds) | {"same_bytes": equal}
    leave()
    print(_line(found))
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(
        json.dumps({"machine": machine("torch", "deepspeed", "safetensors"), "results": [found]}, indent=1) + "\n"
    )
    return 0 if equal and found["share"] <= HIGHEST_SHARE else 1


def _line(found: dict) -> str:
    return (
        f"{found['case']}, {found['bytes'] / 1e9:.2f} GB: {found['at_once_s']:.2f} s waited for "
        f"({found['gb_per_s_at_once']:.2f} GB/s), stall beside training {found['stall_s']:.2f} s, "
        f"{found['share']:.1%} (the calls alone {found['calls_s']:.2f} s, {found['share_of_calls']:.1%})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
