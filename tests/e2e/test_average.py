"""A moving average of the weights: kept beside them, evaluated and published by --ema, begun and dropped in mid-run."""

import json

import torch
from command_line import Ended, Project

from mmpretrain.training.manifest import read_weights
from mmpretrain.training.publish import run_facts
from mmpretrain.training.trained import open_trained

AVERAGED = "ema={decay: 0.5}"
TASK = "evaluation.tasks.retrieval={kind: retrieval}"


def evaluate(project: Project, *options: str) -> Ended:
    return project.warm.start(["eval", str(project.output), *options, TASK], project.logs).wait()


def test_an_average_is_evaluated_and_published_in_place_of_the_last_weights(project: Project) -> None:
    assert project.train(AVERAGED).code == 0
    last, average = (read_weights(project.output / "checkpoints" / "step-00000006", averaged) for averaged in (0, 1))
    differs = [name for name, weight in last.items() if not torch.equal(weight, average[name])]
    assert last.keys() == average.keys() and len(differs) > len(last) - 5
    trained = open_trained(project.output, averaged=True)
    assert all(torch.equal(weight, average[name]) for name, weight in trained.model.named_parameters())
    assert run_facts(trained, "other", "tiny").evaluations is None, "nobody measured the average yet"

    assert [evaluate(project, *options).code for options in (("--ema",), ())] == [0, 0]
    rows = [json.loads(line) for line in (project.output / "evals.jsonl").read_text().splitlines()]
    assert [row["averaged"] for row in rows] == [True, False]
    facts = run_facts(trained, "other", "tiny")
    assert facts.average_decay == 0.5 and facts.evaluated_at_step == 6
    assert facts.evaluations == {name: value for name, value in rows[0].items() if "/" in name}
    assert run_facts(open_trained(project.output), "other", "tiny").average_decay is None


def test_an_average_begins_and_ends_where_the_run_says(project: Project) -> None:
    assert project.train("steps=2", "schedule.kind=constant").code == 0
    ended = evaluate(project, "--ema")
    assert (
        ended.code == 5
        and "holds no moving average of the weights; leave --ema out, or train with ema:" in ended.stderr
    )
    before = read_weights(project.output / "checkpoints" / "step-00000002")
    assert project.train("steps=3", "schedule.kind=constant", "ema={decay: 0.5, warmup: false}").code == 0
    newest = project.output / "checkpoints" / "step-00000003"
    after, average = read_weights(newest), read_weights(newest, averaged=True)
    for name, weight in before.items():
        torch.testing.assert_close(average[name], (weight + after[name]) / 2, msg=name)
    ended = project.train("steps=4", "schedule.kind=constant")
    assert ended.code == 0 and "holds a moving average of the weights, which this run does not carry on" in ended.stderr
