"""What a user can get wrong, met at the command line: a message that names it, an exit code, and nothing else lost."""

import io
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from command_line import Ended, Project, flip_middle_byte, losses_of, wait_until

# The configuration.


def test_all_faults_of_a_run_file_are_told_at_once_with_line_and_suggestion(project: Project) -> None:
    text = project.config.read_text().replace("steps: 6", "stepz: 6").replace("fp32", "fp64")
    project.config.write_text(text.replace("warmup: 0", "warmup: none"))
    ended = project.train("optimizer.lr=-1")
    assert ended.code == 2 and not project.output.exists()
    file = f"error: {project.config}"
    assert ended.errors == [
        f"{file}:1: steps: is missing; it has no default, add `steps: <integer>`",
        f"{file}:2: stepz: unknown key; did you mean steps?",
        f"{file}:3: precision: saw 'fp64' (text), expected 'fp32', 'bf16' or 'fp16'; did you mean fp16?",
        "error: command line: optimizer.lr=-1: saw -1 (number), expected greater than 0",
        f"{file}:18: schedule.warmup: saw 'none' (text), expected an integer",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("gradient_clipping=3.0", "gradient_clipping: 3.0 contradicts 1.0, which the run's own settings give"),
        ("zero_optimization.stage=3", "engine.deepspeed.zero_optimization.stage: 3 contradicts 2"),
        ("bf16.enabled=true", "engine.deepspeed.bf16: the run's own precision decides this; set that instead"),
        ("scheduler.type=WarmupLR", "engine.deepspeed.scheduler: the run's own schedule decides this"),
        ("gradient_clippin=3.0", "knows no such option and would pass over it; did you mean gradient_clipping?"),
        ("zero_optimization.bucket=1", "bucket; Extra inputs are not permitted"),
        ("wall_clock_breakdown=often", "engine.deepspeed: DeepSpeed refuses these options"),
    ],
)
def test_an_engine_option_that_contradicts_or_is_unknown_is_refused(
    project: Project, option: str, message: str
) -> None:
    assert_refused(project.train(f"engine.deepspeed.{option}"), 2, message)
    assert project.outcome() == ("fatal", 0)


def test_engine_options_that_are_not_modelled_are_passed_through(project: Project) -> None:
    options = ["zero_optimization.reduce_bucket_size=1000000", "wall_clock_breakdown=false", "prescale_gradients=false"]
    assert project.train(*(f"engine.deepspeed.{option}" for option in options)).code == 0


# The data.


def test_a_missing_folder_of_shards_is_named_with_the_command_that_makes_one(project: Project) -> None:
    ended = project.train("data.train.sources.main.shards=[/nowhere/shards]")
    assert_refused(ended, 3, "'/nowhere/shards': nothing there", "mmpretrain data pack")
    assert project.outcome() == ("fatal", 0)


def test_a_truncated_shard_is_named(project: Project) -> None:
    shard = first_shard(project)
    os.truncate(shard, shard.stat().st_size // 2)
    assert_refused(project.train(), 3, f"{shard} changed since it was indexed")
    index_of(shard).unlink()
    assert_refused(project.train(), 3, f"{shard}: at byte", "was cut off")


def test_a_shard_that_changed_since_it_was_indexed_is_named(project: Project) -> None:
    shard = first_shard(project)
    flip_middle_byte(shard)
    assert_refused(project.train(), 3, f"{shard} changed since it was indexed", "mmpretrain data index")


def test_a_tar_without_pairs_is_named(project: Project) -> None:
    shard = project.shards / "zz.tar"
    write_tar(shard, {"000.txt": b"a caption", "001.txt": b"another"})
    assert_refused(project.train(), 3, f"{shard} is a tar without pairs")


def test_a_pipe_is_refused_and_its_command_does_not_run(project: Project) -> None:
    proof = project.folder / "proof"
    ended = project.train(f'data.train.sources.main.shards=["pipe:touch {proof}; cat {first_shard(project)}"]')
    assert_refused(ended, 3, "shell commands are never run")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("member", "message"),
    [("000.pkl", "pickle member"), ("../000.jpg", "climbs out"), ("/000.jpg", "absolute name")],
)
def test_an_unsafe_member_is_named(project: Project, member: str, message: str) -> None:
    shard = project.shards / "zz.tar"
    write_tar(shard, {"000.txt": b"a caption", member: b"content"})
    assert_refused(project.train(), 3, f"{shard}: at byte", repr(member), message)


def test_an_undecodable_sample_within_the_budget_is_replaced_and_counted(project: Project) -> None:
    shard = first_shard(project)
    bad = damage_picture(shard, 5)
    assert project.train("steps=8", "trace_samples=true").code == 0
    (skip,) = project.rows("ledger.jsonl")
    assert (skip["shard"], skip["ordinal"], skip["key"]) == (str(shard), 5, bad)
    assert "image" in str(skip["reason"])
    seen = [key for row in project.rows("samples.jsonl") for key in row["keys"]]  # type: ignore[attr-defined]
    assert len(seen) == 64 and len(set(seen)) == 63  # one epoch: all but the bad one, one of them twice
    assert f"{shard.stem}/{bad}" not in seen


def test_past_the_budget_the_run_stops_and_names_shard_and_sample(project: Project) -> None:
    shard = first_shard(project)
    bad = damage_picture(shard, 5)
    ended = project.train("steps=8", "data.bad_sample_budget=0")
    assert_refused(ended, 3, f"{shard} (1; {bad}: ", "1 unusable samples")
    assert [skip["key"] for skip in project.rows("ledger.jsonl")] == [bad]
    assert project.outcome() == ("fatal", len(project.rows("metrics.jsonl")))


def test_ranks_stop_together_past_the_budget(project: Project) -> None:
    shard = first_shard(project)
    damage_picture(shard, 5)
    overrides = ["micro_batch_size=4", "steps=8", "data.bad_sample_budget=0"]
    for rank, ended in enumerate(project.train_ranks(2, *overrides)):
        assert ended.code == 3
        assert [f"{shard} (1; " in error for error in ended.errors if error.startswith(f"[rank {rank}]")] == [True]
    assert project.outcome()[0] == "fatal"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "retrieval", "shards": "[/nowhere/val]"}, "'/nowhere/val': nothing there"),
        ({"kind": "zeroshot", "classes": "/nowhere/classes.json"}, "cannot read the classes of /nowhere/classes.json"),
    ],
)
def test_what_an_evaluation_needs_is_missed_before_the_first_step(
    project: Project, task: Mapping[str, str], message: str
) -> None:
    ended = project.train(*(f"evaluation.tasks.last.{key}={value}" for key, value in task.items()))
    assert_refused(ended, 3, message)
    assert project.rows("metrics.jsonl") == []


def test_a_killed_loader_worker_is_told_and_the_run_goes_on_when_started_again(project: Project) -> None:
    process = project.start("data.workers=1", "steps=10000")
    wait_until(lambda: len(project.rows("metrics.jsonl")) > 3, "step 3")
    workers = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    assert len(workers) == 1
    workers[0].kill()
    assert_refused(process.wait(), 4, "a process that decodes data ended", "data.workers")
    assert not (project.output / "outcome.json").exists()
    done = len(project.rows("metrics.jsonl"))
    assert project.train(f"steps={done + 2}").code == 0
    assert project.outcome() == ("completed", done + 2)


# The machine.


def test_fp16_without_cuda_is_refused(project: Project) -> None:
    ended = project.train("precision=fp16")
    assert_refused(ended, 4, "precision: fp16 needs a CUDA device and this run is on cpu; use precision: bf16 or fp32")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_file_in_the_way_of_the_output_is_named(project: Project, inside: str) -> None:
    (project.folder / "file").write_text("")
    ended = project.train(f"output={project.folder}/file{inside}")
    assert_refused(ended, 4, f"the run folder {project.folder}/file{inside} cannot be written", "set output to")
    assert ended.stderr.count("\n") == 1


def test_no_room_for_a_checkpoint_leaves_the_earlier_ones(project: Project) -> None:
    assert project.train().code == 0
    before = contents(project.output / "checkpoints")
    ended = project.train("steps=8", max_file_bytes=100_000)
    assert_refused(
        ended, 5, "step-00000008 could not be written", "File too large", "earlier checkpoints are untouched"
    )
    assert project.outcome() == ("fatal", 8)
    assert contents(project.output / "checkpoints") == before
    assert project.train("steps=8").code == 0
    assert project.outcome() == ("completed", 8)


def test_no_room_for_anything_else_is_told_without_a_traceback(project: Project) -> None:
    assert project.train().code == 0
    before = contents(project.output / "checkpoints")
    ended = project.train("steps=8", max_file_bytes=1_000)
    assert_refused(ended, 4, f"the run folder {project.output} cannot be written (File too large)")
    assert contents(project.output / "checkpoints") == before


# Checkpoints.


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(project: Project) -> None:
    assert project.train().code == 0
    first_losses = project.losses()
    damaged = project.checkpoints[-1]
    flip_middle_byte(damaged / "rank-00000.safetensors")
    ended = project.train()
    assert ended.code == 0
    assert f"checkpoint {damaged} is damaged (rank-00000.safetensors does not match its SHA-256)" in ended.stderr
    assert "continuing from step 4 of 6" in ended.stderr
    again = {row["step"]: row["train/loss"] for row in project.rows("metrics.jsonl") if row["attempt"] == 1}
    assert again == {step: first_losses[step] for step in (5, 6)}
    assert project.train("steps=7").stderr.count("is damaged") == 0


def test_where_all_checkpoints_are_damaged_the_run_does_not_start_over(project: Project) -> None:
    assert project.train().code == 0
    flip_middle_byte(project.checkpoints[0] / "rank-00000.safetensors")
    (project.checkpoints[1] / "manifest.json").write_text("{")
    ended = project.train("steps=8")
    assert_refused(ended, 5, "no valid checkpoint among 2", "move the folder away to start again from step 0")
    assert ended.stderr.count("is damaged") == 2
    assert len(project.rows("metrics.jsonl")) == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.towers.image.width=64", "the checkpoint belongs to another model: .* tensors of another shape"),
        ("seed=3", "holds a run with another seed, global_batch_size or other data.train shards"),
        ("global_batch_size=16", "holds a run with another seed, global_batch_size or other data.train shards"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays_usable(project: Project, override: str, message: str) -> None:
    assert project.train().code == 0
    record = ("config.yaml", "outcome.json", "heartbeat.json")
    before = [(project.output / name).read_text() for name in record]
    ended = project.train(override)
    assert ended.code == 5
    assert re.search(message, ended.errors[0]), ended.stderr
    assert [(project.output / name).read_text() for name in record] == before
    assert project.train("steps=7").code == 0


# The numbers.


def test_a_run_that_diverges_stops_and_names_the_samples(project: Project) -> None:
    settings = ["optimizer.lr=1e30", "optimizer.clip_grad_norm=0", "max_skipped_steps=1", "trace_samples=true"]
    ended = project.train(*settings)
    assert_refused(ended, 1, "2 steps in a row had a loss or gradient that is not finite", "lower optimizer.lr")
    assert project.outcome() == ("fatal", 3)
    seen = project.rows("samples.jsonl")
    assert project.rows("skipped.jsonl") == [{"step": row["step"], "keys": row["keys"]} for row in seen[1:]]
    assert [len(row["keys"]) for row in seen] == [8, 8, 8]  # type: ignore[arg-type]
    assert [row.get("skipped", False) for row in project.rows("metrics.jsonl")] == [False, True, True]
    assert losses_of(project.output)[3] is None
    assert "fatal after step 3" in ended.stdout


def assert_refused(ended: Ended, code: int, *parts: str) -> None:
    """One error message with all these parts, and this exit code."""
    assert (ended.code, len(ended.errors)) == (code, 1), ended.stderr
    for part in parts:
        assert part in ended.errors[0]


def first_shard(project: Project) -> Path:
    return min(project.shards.glob("*.tar"))


def index_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.index")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, so that nothing more and nothing less is there afterwards."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage_picture(shard: Path, number: int) -> str:
    """Put text in place of the picture of sample `number` of a shard without an index; returns its key."""
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    name = [name for name in members if name.endswith(".jpg")][number]
    write_tar(shard, members | {name: b"no picture"})
    index_of(shard).unlink()
    return name.removesuffix(".jpg")


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
