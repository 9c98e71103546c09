"""What fine-tuning from a published folder is worth: accuracy on new pictures, beside the same steps from scratch.

Enter: nothing, or a folder for data and runs. Leaves: a table and benchmarks/results/finetune.json. Exits 1 when a way
of fine-tuning is not above scratch, or a frozen weight is not bitwise that of the published folder.

A contrastive run learns 3,000 captioned pictures and is published. Each way then sees the same 180 other pictures with
labels (six of each of 30 kinds, of 36 the head can name) in the same steps, on 2 ranks under ZeRO-2 and under ZeRO-3;
accuracy is taken over 300 pictures of neither set. Each way has the learning rate that suits it.

    python benchmarks/finetune.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmpretrain.config import configs_folder
from mmpretrain.tracking.record import read_metrics
from mmpretrain.training.manifest import read_weights

RECORD = Path(__file__).parent / "results" / "finetune.json"
STAGES = (2, 3)
PRETRAIN = """\
output: {folder}/pretrained
steps: 400
precision: fp32
zero_stage: 2
global_batch_size: 64
micro_batch_size: 32
model:
  embed_dim: 64
  towers:
    image:
      kind: native
      stem: {{kind: patches, image_size: 24, patch_size: 4}}
      width: 64
      depth: 2
      heads: 4
      mlp_ratio: 2
      pooling: mean
    text: {{kind: native, stem: {{kind: embeddings, context_length: 16}}, width: 64, depth: 2, heads: 4}}
objectives: {{itc: {{kind: infonce}}}}
data:
  train: {{sources: {{main: {{shards: [{folder}/data/train]}}}}}}
  tokenizer: {{train_vocab_size: 512}}
  codecs: {{image: {{kind: image, crop_scale: [1.0, 1.0]}}, text: {{kind: text}}}}
  workers: 0
optimizer: {{lr: 2.0e-3, weight_decay: 0.05}}
schedule: {{warmup: 50}}
checkpoint: {{every: 400}}
tracking: {{log_every: 100}}
"""


@dataclass(frozen=True)
class Way:
    """One way of training the classifier."""

    name: str
    options: tuple[str, ...]
    config: str = "finetune-classify.yaml"
    starts: bool = True
    """From the published folder; otherwise from scratch."""


WAYS = (
    Way("from scratch", ("finetune=null", "optimizer.lr=2e-3"), starts=False),
    Way("whole", ()),
    Way("last block", ("finetune.train=1", "finetune.layer_decay=1.0")),
    Way("heads", ("finetune.train=heads", "finetune.layer_decay=1.0", "optimizer.lr=1e-2")),
    Way("LoRA", (), "finetune-lora.yaml"),
)


def run(*command: str, ranks: int = 1) -> None:
    """`mmpretrain ...`, or as many ranks of it by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "mmpretrain", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")


def prepare(folder: Path) -> None:
    """Shards, a pretrained run and its published folder; what is there already is kept."""
    run("data", "make", "--out", str(folder / "data"), "--samples", "3000")
    run("data", "make", "--out", str(folder / "few"), "--samples", "180", "--seed", "1")
    (folder / "pretrain.yaml").write_text(PRETRAIN.format(folder=folder))
    if not (folder / "published").exists():
        run("train", str(folder / "pretrain.yaml"), ranks=2)
        run("publish", str(folder / "pretrained"), "--to-dir", str(folder / "published"), "--license", "other")


def measure(way: Way, stage: int, folder: Path) -> dict[str, object]:
    """Train one way and take its accuracy; counts the published weights it holds bitwise."""
    output = folder / f"{way.name.replace(' ', '-')}-zero{stage}"
    options = [
        f"output={output}",
        f"zero_stage={stage}",
        f"data.train.sources.main.shards=[{folder / 'few' / 'train'}]",
        f"evaluation.tasks.labels.shards=[{folder / 'data' / 'val'}]",
        "data.workers=0",
        *way.options,
    ]
    start = ["finetune", "--from", str(folder / "published")] if way.starts else ["train"]
    begin = time.perf_counter()
    run(start[0], str(configs_folder() / way.config), *start[1:], *options, ranks=2)
    figures = [row for row in read_metrics(output) if not row.is_training][-1].metrics
    kept, towers = unchanged(output, folder / "published") if way.starts else (0, 0)
    return {
        "way": way.name,
        "zero_stage": stage,
        "accuracy": figures["val/classify_acc"],
        "tower_weights_unchanged": kept,
        "tower_weights": towers,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def unchanged(output: Path, published: Path) -> tuple[int, int]:
    """How many tensors of the image tower are bitwise the published ones, and how many there are."""
    newest = max((output / "checkpoints").glob("step-*"))
    after = {name.replace(".base_layer", ""): tensor for name, tensor in read_weights(newest).items()}
    before = load_file(published / "model.safetensors")
    towers = [name for name in before if name.startswith("towers.image.")]
    return sum(torch.equal(before[name], after[name]) for name in towers), len(towers)


FROZEN = {"whole": 0, "last block": 14, "heads": 28, "LoRA": 28}
"""Tensors of the tower that a way leaves alone: all for heads and LoRA, stem and first block of two."""


def faults(rows: Sequence[dict[str, object]]) -> list[str]:
    scratch = {row["zero_stage"]: row["accuracy"] for row in rows if row["way"] == "from scratch"}
    found = []
    for row in rows:
        way, stage = str(row["way"]), row["zero_stage"]
        if way == "from scratch":
            continue
        if not float(str(row["accuracy"])) > float(str(scratch[stage])):
            found.append(f"{way} under ZeRO-{stage} is not above scratch")
        if row["tower_weights_unchanged"] != FROZEN[way]:
            found.append(f"{way} under ZeRO-{stage} kept {row['tower_weights_unchanged']} tensors, not {FROZEN[way]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of every way of fine-tuning beside that of no pretraining.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/finetune-benchmark"))
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    rows = []
    sys.stdout.write(f"{'way':<14}{'ZeRO':>6}{'accuracy':>10}{'weights of the tower unchanged':>34}{'seconds':>10}\n")
    for way in WAYS:
        for stage in STAGES:
            row = measure(way, stage, folder)
            kept = f"{row['tower_weights_unchanged']} of {row['tower_weights']}" if way.starts else "-"
            sys.stdout.write(f"{way.name:<14}{stage:>6}{row['accuracy']:>10.3f}{kept:>34}{row['seconds']:>10}\n")
            sys.stdout.flush()
            rows.append(row)
    RECORD.write_text(json.dumps(rows, indent=1) + "\n")
    if found := faults(rows):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main()
