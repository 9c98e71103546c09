"""A killed run continues as if nothing had happened: bitwise at the same ranks, the same samples at any.

Five real launches on the same tiny set: uninterrupted, killed, and resumed at 2, 1 and 4 ranks.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch import TIMEOUT_S, run_module, run_ranks

from data_pipeline.make import make
from mmpretrain.core.run_files import read_ranks

STEPS, GLOBAL_BATCH, SAMPLES = 28, 24, 96
EPOCH = SAMPLES // GLOBAL_BATCH
CONFIG = f"""
steps: {STEPS}
precision: fp32
zero_stage: 2
global_batch_size: {GLOBAL_BATCH}
trace_samples: true
checkpoint: {{every: 7, keep_last: 3}}
model:
  embed_dim: 32
  towers:
    image:
      {{kind: native, stem: {{kind: patches, image_size: 16, patch_size: 8}}, width: 32, depth: 1, heads: 2}}
    text: {{kind: native, stem: {{kind: embeddings, context_length: 12}}, width: 32, depth: 1, heads: 2}}
objectives:
  itc: {{kind: infonce}}
  mlm: {{kind: mlm}}
  mim: {{kind: mae, decoder_width: 32, decoder_depth: 1, decoder_heads: 2}}
data:
  tokenizer: {{train_vocab_size: 300}}
  codecs: {{image: {{kind: image, crop_scale: [0.5, 1.0], flip: true}}, text: {{kind: text}}}}
schedule: {{warmup: 5}}
"""


def arguments(folder: Path, output: Path, ranks: int, workers: int) -> list[str]:
    return [
        str(folder / "run.yaml"),
        f"output={output}",
        f"micro_batch_size={GLOBAL_BATCH // ranks}",
        f"data.train.sources.main.shards=[{folder / 'set' / 'train'}]",
        f"data.workers={workers}",
    ]


def train(folder: Path, output: Path, ranks: int, workers: int) -> None:
    run_ranks(ranks, run_module, "mmpretrain.train", arguments(folder, output, ranks, workers))


def last_step(output: Path) -> int:
    path = output / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return json.loads(rows[-1])["step"] if rows and rows[-1].endswith("}") else 0


def train_until_killed(folder: Path, output: Path, kill_at: int) -> None:
    """SIGKILL one of two ranks once `kill_at` steps are done, as the kernel would when memory runs out."""
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, folder, output, ranks=2, workers=1)
        deadline = time.monotonic() + TIMEOUT_S
        while last_step(output) < kill_at:
            assert not training.done() and time.monotonic() < deadline, "the run ended before it could be killed"
            time.sleep(0.005)
        os.kill(random.choice(read_ranks(output)).pid, signal.SIGKILL)
        with pytest.raises(AssertionError, match="rank . of 2 in run_module failed"):
            training.result()
    assert last_step(output) < STEPS and not (output / "outcome.json").exists()


def losses(output: Path) -> dict[int, tuple[int, float]]:
    """Step -> attempt and loss, of the newest attempt that reached it."""
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["attempt"], row["train/loss"]) for row in rows if "train/loss" in row}


def keys(output: Path) -> list[tuple[int, list[str]]]:
    rows = [json.loads(row) for row in (output / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["keys"]) for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("resume")
    make(folder / "set", samples=SAMPLES, image_size=24, samples_per_shard=32, workers=1)
    (folder / "run.yaml").write_text(
        "output: unused\nmicro_batch_size: 1\n"
        + CONFIG.replace(
            "data:\n", f"data:\n  train: {{sources: {{main: {{shards: [{folder / 'set' / 'train'}]}}}}}}\n"
        )
    )
    names = ("uninterrupted", "killed", "at_1_rank", "at_4_ranks")
    outputs = {name: folder / name for name in names}
    train(folder, outputs["uninterrupted"], ranks=2, workers=0)
    train_until_killed(folder, outputs["killed"], kill_at=random.randrange(9, 18))
    for name in ("at_1_rank", "at_4_ranks"):
        shutil.copytree(outputs["killed"], outputs[name])
    train(folder, outputs["killed"], ranks=2, workers=2)
    train(folder, outputs["at_1_rank"], ranks=1, workers=1)
    train(folder, outputs["at_4_ranks"], ranks=4, workers=0)
    return outputs


def test_every_later_loss_is_bitwise_that_of_the_uninterrupted_run(runs: dict[str, Path]) -> None:
    whole, resumed = losses(runs["uninterrupted"]), losses(runs["killed"])
    assert whole.keys() == resumed.keys() == set(range(1, STEPS + 1))
    assert {attempt for attempt, _ in resumed.values()} == {0, 1}
    for step in whole:
        assert whole[step][1] == resumed[step][1], step


@pytest.mark.parametrize("name", ["killed", "at_1_rank", "at_4_ranks"])
def test_samples_of_every_step_are_those_of_the_uninterrupted_run(runs: dict[str, Path], name: str) -> None:
    assert keys(runs[name]) == keys(runs["uninterrupted"])


@pytest.mark.parametrize("name", ["at_1_rank", "at_4_ranks"])
def test_losses_at_other_ranks_stay_close(runs: dict[str, Path], name: str) -> None:
    whole, resumed = losses(runs["uninterrupted"]), losses(runs[name])
    first = min(step for step, (attempt, _) in resumed.items() if attempt == 1)
    for step in range(first, first + 5):
        assert resumed[step][1] == pytest.approx(whole[step][1], abs=1e-5), step


def test_each_sample_occurs_once_an_epoch(runs: dict[str, Path]) -> None:
    for epoch in range(STEPS // EPOCH):
        steps = keys(runs["killed"])[epoch * EPOCH : (epoch + 1) * EPOCH]
        assert set(Counter(key for _, step_keys in steps for key in step_keys).values()) == {1}
        assert sum(len(step_keys) for _, step_keys in steps) == SAMPLES


def test_the_outcome_is_recorded(runs: dict[str, Path]) -> None:
    for output in runs.values():
        assert json.loads((output / "outcome.json").read_text())["state"] == "completed"
        assert len(list((output / "checkpoints").glob("step-*"))) == 3
