"""Checkpoints of a run at the command line: written beside training, told when they are valid, kept by the rules."""

import resource

import torch
from command_line import Project, wait_until
from safetensors.torch import load_file
from torch import Tensor

UNSEEDED = ("rng/python", "rng/numpy", "rng/numpy_gauss")


def tensors(project: Project, output: str, step: int) -> dict[str, Tensor]:
    """All that a checkpoint holds but the generators that no run seeds."""
    folder = project.folder / output / "checkpoints" / f"step-{step:08d}"
    found = load_file(folder / "rank-00000.safetensors")
    return {name: value for name, value in found.items() if name not in UNSEEDED}


def test_what_is_written_in_the_background_is_what_would_be_written_at_once(project: Project) -> None:
    for output, background in (("beside", "true"), ("at_once", "false")):
        options = (f"output={project.folder / output}", f"checkpoint.background={background}", "checkpoint.keep_last=3")
        assert project.train(*options).code == 0
    for step in (2, 4, 6):
        beside, at_once = (tensors(project, output, step) for output in ("beside", "at_once"))
        assert beside.keys() == at_once.keys() and "rng/torch" in beside
        assert all(torch.equal(beside[name], at_once[name]) for name in beside)


def test_a_run_tells_when_each_checkpoint_became_valid(project: Project) -> None:
    ended = project.train("checkpoint.keep_every=4")
    assert [line for line in ended.stdout.splitlines() if line.startswith("checkpoint ")] == [
        f"checkpoint step-{step:08d}" for step in (2, 4, 6)
    ]
    rows = project.rows("checkpoints.jsonl")
    assert [(row["step"], row["event"]) for row in rows] == [(2, "valid"), (4, "valid"), (6, "valid")]
    steps = {row["step"]: row["time"] for row in project.rows("metrics.jsonl")}
    assert all(row["time"] > steps[row["step"]] and row["save_s"] > 0 for row in rows)


def test_a_disk_that_fills_up_beside_training_ends_the_run_as_at_a_save(project: Project) -> None:
    process = project.start("steps=100000", "checkpoint.every=4", "tracking.log_every=100000")
    wait_until((project.output / "checkpoints" / "step-00000004").exists, "the first checkpoint")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    ended = process.wait()
    assert ended.code == 5
    (error,) = ended.errors
    assert "could not be written (rank 0: [Errno 27] File too large); earlier checkpoints are untouched" in error
    assert project.outcome()[0] == "fatal"
    steps = [int(path.name.removeprefix("step-")) for path in project.checkpoints]
    assert 0 < len(steps) <= 2 and all(path.name.startswith("step-") for path in project.checkpoints)
    ended = project.train(f"steps={max(steps) + 1}")
    assert ended.code == 0 and f"continuing from step {max(steps)} of" in ended.stderr


def test_the_best_checkpoint_stays_beside_the_newest(project: Project) -> None:
    rule = "{every: 2, keep_last: 1, keep_best: {metric: val/i2t_r@1, mode: max}}"
    tasks = "evaluation={every: 2, tasks: {retrieval: {kind: retrieval}}}"
    assert project.train(f"checkpoint={rule}", tasks, "steps=12", "optimizer.lr=0.01").code == 0
    figures = {row["step"]: row["val/i2t_r@1"] for row in project.rows("metrics.jsonl") if "val/i2t_r@1" in row}
    assert list(figures) == [2, 4, 6, 8, 10, 12]
    best = max((figures[step], step) for step in (2, 4, 6, 8, 10))[1]  # the last is measured after it was saved
    assert [path.name for path in project.checkpoints] == [f"step-{best:08d}", "step-00000012"]
