"""Every fusion and attention on the four-modality set: how often each answers right, with all it needs and with less.

Enter: nothing, or `--only`, `--steps` and a folder for the runs. Leaves: a table in Markdown on standard output and
benchmarks/results/fusions.json. Exits 1 when a run fails or when losses differ.

Each combination trains the gate's run (configs/gate.yaml) on 2 ranks under ZeRO-2, all its steps, and its warmup under
ZeRO-3, whose first losses must be those of ZeRO-2. Runs that are done are not done again. Early fusion runs over bare
stems, with as many blocks in its trunk as the others have in tower and fusion together.

    python benchmarks/fusions.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from machine import machine

from data_pipeline.make import make
from mmpretrain.config import RunConfig, configs_folder, load_run_config
from mmpretrain.core.config import dump_yaml
from mmpretrain.demo import last_figures
from mmpretrain.tracking.record import read_metrics

RECORD = Path(__file__).parent / "results" / "fusions.json"
RANKS, SAMPLES = 2, 6000
LR = 2.0e-3
"""The rate at which the README's table was made."""
COMPARED = 10
"""Steps whose losses under both stages are compared; rounding in another order drives longer runs apart."""
TOLERANCE = 1e-3
"""Largest relative difference of those losses."""
SIZE = {"width": 64, "heads": 4, "mlp_ratio": 2}
CHOSEN = {"question": ["audio", "image", "video"], "image": ["question"], "video": ["question"], "audio": ["question"]}
"""The question looks at all media, each medium at the question alone."""

FUSIONS: dict[str, dict[str, object]] = {
    "early": {"kind": "early", "depth": 4, **SIZE},
    "early, experts": {"kind": "early", "depth": 4, "experts": True, **SIZE},
    "late, mean": {"kind": "late", "pooled": "mean", "width": 64},
    "late, concat": {"kind": "late", "pooled": "concat", "width": 64},
    "late, gated": {"kind": "late", "pooled": "gated", "width": 64},
    "joint": {"kind": "joint", "depth": 2, **SIZE},
    "cross, all pairs": {"kind": "cross", "depth": 2, **SIZE},
    "cross, chosen pairs": {"kind": "cross", "depth": 2, "attend": CHOSEN, **SIZE},
    "gated, all pairs": {"kind": "gated", "depth": 2, **SIZE},
    "gated, chosen pairs": {"kind": "gated", "depth": 2, "attend": CHOSEN, **SIZE},
    "hierarchical, joint": {"kind": "hierarchical", "latents": 8, "depth": 2, **SIZE},
    "hierarchical, bottleneck": {"kind": "hierarchical", "latents": 8, "depth": 2, "bottlenecks": 4, **SIZE},
}
COLUMNS = {
    "all": "val/answer_acc",
    "no picture": "val/answer_acc_no_image",
    "no video": "val/answer_acc_no_video",
    "no sound": "val/answer_acc_no_audio",
    "no question": "val/answer_acc_no_question",
    "held out": "heldout/answer_acc",
}


def run_config(fusion: dict[str, object], folder: Path, stage: int, steps: int | None) -> RunConfig:
    """The gate's run with another fusion and `LR`; under ZeRO-3 its warmup alone, and nothing is evaluated."""
    gate = load_run_config(configs_folder() / "gate.yaml").model_dump(mode="json")
    fields = json.loads(json.dumps(gate).replace("runs/gate/", f"{folder}/"))
    fields["model"]["fusion"], fields["optimizer"]["lr"] = fusion, LR
    if fusion["kind"] == "early":
        fields["model"]["towers"] = {
            name: {"kind": "stem", "stem": tower["stem"], "width": tower["width"]}
            for name, tower in fields["model"]["towers"].items()
        }
    steps = steps or fields["steps"]
    warmup = min(steps, fields["schedule"]["warmup"])
    fields["schedule"]["warmup"] = warmup
    fields |= {"zero_stage": stage, "micro_batch_size": fields["global_batch_size"] // RANKS}
    if stage == 3:
        fields |= {"steps": warmup, "evaluation": {}}
    else:
        fields |= {"steps": steps}
    return RunConfig.model_validate_json(json.dumps(fields), strict=True)


def train(config: RunConfig, output: Path) -> None:
    """Run it unless it is done; CalledProcessError where it fails."""
    outcome = json.loads(path.read_text()) if (path := output / "outcome.json").exists() else {}
    if (outcome.get("state"), outcome.get("step")) == ("completed", config.steps):
        return
    path = output.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    subprocess.run(
        [*command, "-m", "mmpretrain.train", str(path), f"output={output}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=sys.stderr,
        check=True,
    )


def measure(name: str, folder: Path, steps: int | None) -> dict[str, object]:
    """Train one combination under both stages."""
    output = folder / name.replace(",", "").replace(" ", "-")
    runs = {stage: output / f"zero{stage}" for stage in (2, 3)}
    for stage, run in sorted(runs.items()):
        train(run_config(FUSIONS[name], folder, stage, steps), run)
    losses = {stage: _losses(run)[:COMPARED] for stage, run in runs.items()}
    figures = last_figures(runs[2])
    return {
        "fusion": name,
        "steps": {f"zero{stage}": len(_losses(run)) for stage, run in runs.items()},
        "zero3_difference": max(abs(a - b) / abs(b) for a, b in zip(losses[3], losses[2], strict=True)),
        "answers": {column: figures[figure] for column, figure in COLUMNS.items()},
    }


def _losses(run: Path) -> list[float]:
    return [row.metrics["train/loss"] for row in read_metrics(run) if row.is_training]


def markdown(results: list[dict]) -> str:
    """The table of the README."""
    lines = [f"| fusion | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for result in results:
        cells = (f"{result['answers'][column]:.2f}" for column in COLUMNS)
        lines.append(f"| {result['fusion']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FUSIONS), choices=list(FUSIONS))
    parser.add_argument("--steps", type=int, help="Fewer than the gate's.")
    parser.add_argument("--folder", type=Path, default=Path("runs/fusions"))
    parser.add_argument("--record", type=Path, default=RECORD)
    asked = parser.parse_args()
    make(asked.folder / "data", SAMPLES)
    results = [measure(name, asked.folder, asked.steps) for name in asked.only]
    print(markdown(results))
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(
        json.dumps({"machine": machine("torch", "deepspeed") | {"ranks": RANKS}, "results": results}, indent=1) + "\n"
    )
    apart = [result["fusion"] for result in results if not result["zero3_difference"] <= TOLERANCE]
    if apart:
        print(f"losses under ZeRO-3 differ from those under ZeRO-2: {'; '.join(apart)}", file=sys.stderr)
    return 1 if apart else 0


if __name__ == "__main__":
    raise SystemExit(main())
