"""`mmpretrain finetune` as a user drives it: from a run of one's own, stopped and continued, and what it refuses."""

import json
import shutil
from pathlib import Path

from command_line import Ended, Project, losses_of

from mmpretrain.config import configs_folder
from mmpretrain.publishing.facts import ParentFacts
from mmpretrain.training.publish import run_facts
from mmpretrain.training.trained import open_trained


def finetune(project: Project, start: Path | str, *overrides: str) -> Ended:
    """Into the folder `tuned`, from what the project's own run learned or from something else."""
    arguments = [str(project.config), "--from", str(start), f"output={project.folder / 'tuned'}", *overrides]
    return project.warm.start(["finetune", *arguments], project.logs).wait()


LORA = ("finetune.lora.rank=2", "finetune.lora.targets=[attention]", "finetune.lora.towers=[image]")


def test_a_fine_tuned_run_continues_by_itself_and_can_be_started_from(project: Project) -> None:
    assert project.train().code == 0
    tuned = project.folder / "tuned"
    ended = finetune(project, project.output, "seed=1", *LORA)
    assert ended.code == 0, ended.stderr
    table = next(line for line in ended.stderr.splitlines() if line.startswith("towers.text"))
    assert table.split()[1] != "0" and table.split()[2:] == ["0", "0"]
    words = [(folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in (project.output, tuned)]
    assert words[0] == words[1]
    record = json.loads((tuned / "parent.json").read_text())
    assert record["source"] == str(project.output) and record["description"] == "step 6 of an mmpretrain run"

    whole = losses_of(tuned)
    shutil.rmtree(tuned / "checkpoints" / "step-00000006")
    moved = project.folder / "moved"
    project.output.rename(moved)  # what it began from is not read again
    assert finetune(project, project.output, "seed=1", *LORA).code == 0
    assert losses_of(tuned) == whole and len(whole) == 6

    trained = open_trained(tuned)
    assert trained.model.state_dict().keys() == open_trained(moved).model.state_dict().keys()
    assert run_facts(trained, "other", "tuned").parent == ParentFacts(
        str(project.output), record["description"], record["digest"]
    )
    arguments = [str(project.config), "--from", str(tuned), f"output={project.folder / 'again'}", "finetune.train=1"]
    again = project.warm.start(["finetune", *arguments], project.logs).wait()
    assert again.code == 0, again.stderr


def with_words_swapped(tokenizer: Path, folder: Path) -> Path:
    """The same tokenizer but for two words, each with the number of the other."""
    shutil.copytree(tokenizer, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_what_cannot_be_fine_tuned_is_refused_with_one_message(project: Project) -> None:
    assert project.train("steps=2", "model.towers.image.depth=1").code == 0
    start, tuned = project.output, project.folder / "tuned"
    other = with_words_swapped(start / "tokenizer", project.folder / "other-words")
    wide = ("model.towers.image.width=48", "model.towers.text.width=48", "model.embed_dim=40")
    strange = "is neither a run folder nor a checkpoint, and no model folder or reachable hub name of transformers"
    for place, options, code, message in [
        ("/nowhere", (), 5, f"--from /nowhere {strange}"),
        ("no/model", (), 5, f"--from no/model {strange}"),
        (project.shards, (), 5, f"--from {project.shards} {strange}"),
        (start, wide, 5, "none of its weights fit this model; "),
        (start, ("finetune.train=3",), 2, "the last 3 blocks of the tower image are to learn and it has 2"),
        (start, ("finetune.train=frozen",), 2, "finetune: nothing is left to learn"),
        (start, ("finetune.lora.targets=[conv]",), 2, "'conv' matches no linear layer of the tower image"),
        (start, (f"data.tokenizer.path={other}",), 2, f"data.tokenizer.path {other} numbers words in another way"),
    ]:
        ended = finetune(project, place, *options)
        assert ended.code == code, (options, ended.stderr)
        assert len(ended.errors) == 1 and message in ended.errors[0], ended.errors
        shutil.rmtree(tuned, ignore_errors=True)


def test_a_run_folder_of_another_beginning_is_refused(project: Project) -> None:
    assert project.train("steps=2").code == 0
    ended = finetune(project, "anywhere", f"output={project.output}")
    assert ended.code == 5
    assert ended.errors == [
        f"error: {project.output} holds a run that began from scratch, not from anywhere; choose another output, or "
        "name what it began from to go on"
    ]
    assert finetune(project, project.output, "steps=2").code == 0
    ended = finetune(project, project.folder, "steps=2")
    assert (
        ended.code == 5 and f"holds a run that began from {project.output}, not from {project.folder};" in ended.stderr
    )


def test_a_finetune_part_without_a_beginning_is_refused_by_train(project: Project) -> None:
    ended = project.train("finetune.train=1")
    assert ended.code == 2
    assert "the run has a finetune part and nothing to start from; give --from CHECKPOINT" in ended.errors[0]


def test_finetune_needs_something_to_start_from(project: Project) -> None:
    ended = project.warm.start(["finetune", str(configs_folder() / "finetune-classify.yaml")], project.logs).wait()
    assert ended.code == 2 and "--from" in ended.stderr
