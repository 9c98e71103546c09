"""A run that reads from a failing server, is killed and goes on; `mmpretrain data ledger` proves or refuses it."""

import json
import shutil
import signal
from collections.abc import Iterator

import pytest
from command_line import Ended, Project, wait_until
from object_stores import Faults, http_server

from data_pipeline.indexing import index_shards

STEPS = 24
OVERRIDES = (f"steps={STEPS}", "checkpoint.every=5", "data.cache.attempts=20", "data.cache.ahead=64")


@pytest.fixture
def served(project: Project) -> Iterator[tuple[str, Faults]]:
    """The project's shards, which its own machine no longer has, at an address."""
    index_shards([str(project.shards)], workers=1)
    store = project.folder / "store"
    shutil.move(project.shards, store / "set")
    faults = Faults(drop=0.15, corrupt=0.15, refuse=0.1)
    with http_server(store, faults) as url:
        yield f"{url}/set", faults


def ledger(project: Project) -> Ended:
    return project.warm.start(["data", "ledger", str(project.output)], project.folder / "ledger-logs").wait()


def test_a_killed_run_over_http_lost_nothing_and_a_doctored_record_is_refused(
    project: Project, served: tuple[str, Faults]
) -> None:
    url, faults = served
    where = (*OVERRIDES, f"data.train.sources.main.shards=[{url}]", f"data.cache.folder={project.folder / 'cache'}")
    process = project.start(*where)
    wait_until(lambda: len(project.rows("metrics.jsonl")) >= 8, "step 8")
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    ended = project.train(*where)
    assert ended.code == 0 and "continuing from step" in ended.stderr, ended.stderr
    assert sum(faults.answers[outcome] for outcome in ("drop", "corrupt", "refuse")) > 0

    proof = ledger(project)
    assert proof.code == 0, proof.stderr
    assert f"{STEPS} steps consumed {STEPS * 8} samples" in proof.stdout
    rows = [row.split() for row in proof.stdout.splitlines() if "main" in row]
    assert [[cell for cell in row if cell != "│"] for row in rows] == [["main", "0", "to", "2", "64", "64", *"0000"]]
    assert [row["data/epochs_main"] for row in project.rows("metrics.jsonl")[-2:]] == [2.875, 3.0]

    config = project.output / "config.yaml"
    whole = config.read_text()
    fewer = whole.replace(f"steps: {STEPS}\n", "steps: 10\n")
    assert fewer != whole
    config.write_text(fewer)
    lowered = ledger(project)
    config.write_text(whole)
    assert lowered.code == 0 and f"{STEPS} steps consumed" in lowered.stdout, "as far as it came before"

    record = project.output / "consumed.jsonl"
    lines = record.read_text().splitlines()
    other = json.dumps({"step": 20, "digest": "0123456789abcdef"})
    record.write_text("\n".join([*lines[:6], *lines[7:19], other, *lines[20:]]) + "\n")
    refused = ledger(project)
    assert refused.code == 3
    told = refused.stderr
    assert "steps 7 left no word of what they consumed" in told
    assert "steps 20 consumed something else than the order of samples says" in told
    assert "set main, epoch 0: 8 samples lost: http://" in told and "set main, epoch 2: 8 samples lost" in told

    record.unlink()
    assert (
        ledger(project).errors[0].startswith(f"error: {project.output} holds no config.yaml and consumed.jsonl; name")
    )


def test_a_store_that_is_away_ends_the_run_with_what_was_tried(project: Project) -> None:
    ended = project.train("data.train.sources.main.shards=[http://127.0.0.1:9/set]", "data.cache.attempts=2")
    assert ended.code == 3
    assert len(ended.errors) == 1
    assert "http://127.0.0.1:9/set/collection.index: gave up after 2 attempts in" in ended.errors[0]
    assert "check the network and the store, then start again, or raise data.cache.attempts" in ended.errors[0]
