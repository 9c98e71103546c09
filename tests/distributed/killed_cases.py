"""A rank that is killed at some moment of a save, again and again; the test beside it runs this on a group of one rank.

Enter: a folder, a seed, how many times. Leave: the checkpoint before in `before/`, and for every kill a folder as the
rank left it and a line in `trials.jsonl`.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import engine_cases as cases
import torch

from mmpretrain.training import checkpoint
from mmpretrain.training.engine import Engine
from mmpretrain.training.manifest import Position

PAST_THE_END = 1.2
"""Moments are drawn up to so many durations of a whole save."""


def killed_saves(folder: Path, seed: int, kills: int) -> None:
    (_, engine), (_, reader) = (next(cases.engines("rows", [1], [2], **cases.AVERAGED)) for _ in range(2))
    states = {}
    for step in (1, 2):
        cases.train(engine, range(step - 1, step))
        states[step] = cases.full_state(engine)
        if step == 1:
            checkpoint.save(engine, folder / "before", Position(1, cases.GLOBAL_BATCH, "d"), "seed: 0\n")
    draw, whole_s = random.Random(seed), _seconds_of_a_save(engine, folder / "whole")
    for number in range(kills):
        trial, moment_s = folder / f"trial-{number:02}", draw.uniform(0, PAST_THE_END * whole_s)
        shutil.copytree(folder / "before", trial)
        saving = _fork_a_save(engine, trial)
        time.sleep(moment_s)
        os.kill(saving, signal.SIGKILL)
        os.waitpid(saving, 0)
        partial = any(trial.glob(".step-*.partial"))
        row = {"moment": moment_s / whole_s, "partial": partial} | _restored(reader, trial, states)
        with (folder / "trials.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        _save(engine, trial)  # as the next attempt will
        assert _restored(reader, trial, states) == {"step": 2, "equal": True}


def _restored(reader: Engine, trial: Path, states: dict[int, dict[str, torch.Tensor]]) -> dict[str, object]:
    """The step that a rank finds there, and whether all it restores is bitwise what was saved."""
    for one in reader.fragments():
        one.view.detach().fill_(7)
    position = checkpoint.load(reader, trial)
    assert position is not None
    state = cases.full_state(reader)
    equal = all(torch.equal(state[name], value) for name, value in states[position.step].items())
    return {"step": position.step, "equal": equal}


def _save(engine: Engine, folder: Path) -> None:
    checkpoint.save(engine, folder, Position(2, 2 * cases.GLOBAL_BATCH, "d"), "seed: 0\n")


def _fork_a_save(engine: Engine, folder: Path) -> int:
    """A process that saves what this one holds, and then waits to be killed."""
    saving = os.fork()
    if not saving:
        try:
            _save(engine, folder)
            signal.pause()
        finally:
            os._exit(1)
    return saving


def _seconds_of_a_save(engine: Engine, folder: Path) -> float:
    begun = time.monotonic()
    saving = _fork_a_save(engine, folder)
    while not any(folder.glob("step-*")):
        time.sleep(0.0005)
    seconds = time.monotonic() - begun
    os.kill(saving, signal.SIGKILL)
    os.waitpid(saving, 0)
    return seconds
