"""`mmpretrain demo`: synthetic shards -> pretrain -> evaluate -> report -> publish, as a user would do it by hand.

Enter: a folder. Leave: in it shards, a run with its report, a published model, and on screen figures beside chance.
Refused: a folder that holds another demo half done is continued; figures below their gates end with exit code 1.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmpretrain.config import configs_folder
from mmpretrain.core.errors import MMPretrainError
from mmpretrain.tracking.record import read_metrics

SAMPLES = 6000
RANKS = 2


@dataclass(frozen=True)
class Gate:
    """A figure that a model which learned its task exceeds."""

    label: str
    figure: str
    chance: str
    """What guessing gives: a number, or the name of the figure that measures it."""
    floor: float


GATES = (
    Gate("name the shape in a new picture, of 30 seen kinds", "val/zeroshot_top1", "val/zeroshot_chance", 0.75),
    Gate("the same, of 6 kinds never shown together", "heldout/zeroshot_top1", "heldout/zeroshot_chance", 0.35),
    Gate("find a caption of the picture, R@1", "val/i2t_r@1", "val/i2t_chance_r@1", 0.60),
    Gate("find a picture for the caption, R@1", "val/t2i_r@1", "val/t2i_chance_r@1", 0.60),
    Gate("fill in hidden words, seeing the picture", "val/mlm_acc", "val/mlm_acc_shuffled", 0.80),
)


class DemoError(MMPretrainError):
    """The demo ran, and the model learned less than it should have."""


def demo(folder: Path) -> None:
    """Run every stage by the command line's own commands; what is done already is not done again."""
    console = Console(stderr=True, highlight=False)
    for title, command in stages(folder):
        console.print(f"\n[bold]{title}[/bold]\n[dim]$ {escape(shlex.join(command))}[/dim]", soft_wrap=True)
        done = subprocess.run([*_runnable(command)], env=_environment(), check=False)
        if done.returncode:
            raise DemoError(f"`{shlex.join(command)}` ended with exit code {done.returncode}; its message is above")
    figures = _last_figures(folder / "run")
    Console().print(table(figures))
    Console().print(f"report     {folder / 'run' / 'report.html'}\npublished  {folder / 'published'}", soft_wrap=True)
    low = [gate.label for gate in GATES if figures[gate.figure] < gate.floor]
    if low:
        raise DemoError(f"below the gate: {'; '.join(low)}")


def stages(folder: Path) -> list[tuple[str, list[str]]]:
    """Title and command of each stage, as a user would type it."""
    data, run, config = folder / "data", folder / "run", configs_folder() / "demo.yaml"
    training = ["torchrun", "--standalone", "--nproc-per-node", str(RANKS), "-m", "mmpretrain.train", str(config)]
    shards = {
        "output": str(run),
        "data.train.sources.main.shards": f"[{data / 'train'}]",
        "evaluation.tasks.retrieval.shards": f"[{data / 'val'}]",
        "evaluation.tasks.words.shards": f"[{data / 'val'}]",
        "evaluation.tasks.zeroshot.shards": f"[{data / 'val'}]",
        "evaluation.tasks.zeroshot.classes": str(data / "classes.json"),
        "evaluation.tasks.heldout.shards": f"[{data / 'heldout'}]",
        "evaluation.tasks.heldout.classes": str(data / "classes.json"),
    }
    published = folder / "published"
    publishing = ["mmpretrain", "publish", str(run), "--to-dir", str(published), "--license", "apache-2.0"]
    return [
        (
            "Draw shapes and write captions, as shards",
            ["mmpretrain", "data", "make", "--out", str(data), "--samples", str(SAMPLES)],
        ),
        (f"Pretrain on {RANKS} ranks under ZeRO-2", training + [f"{key}={value}" for key, value in shards.items()]),
        ("Write the report page", ["mmpretrain", "report", str(run)]),
        *([] if published.exists() else [("Publish, and verify in a fresh process", publishing)]),
    ]


def table(figures: Mapping[str, float]) -> Table:
    """The gates' figures beside what guessing gives."""
    view = Table(title="What the model learned")
    view.add_column("task")
    for heading in ("chance", "measured", "gate"):
        view.add_column(heading, justify="right")
    for gate in GATES:
        measured = figures[gate.figure]
        style = "green" if measured >= gate.floor else "red"
        view.add_row(
            gate.label, f"{figures[gate.chance]:.3f}", f"[{style}]{measured:.3f}[/{style}]", f"{gate.floor:.2f}"
        )
    return view


def _runnable(command: Sequence[str]) -> list[str]:
    """The command by this interpreter, whatever is on PATH."""
    modules = {"torchrun": "torch.distributed.run", "mmpretrain": "mmpretrain"}
    return [sys.executable, "-m", modules[command[0]], *command[1:]]


def _environment() -> dict[str, str]:
    """One thread a rank: two ranks with all threads each run many times slower."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _last_figures(run: Path) -> Mapping[str, float]:
    return [row for row in read_metrics(run) if not row.is_training][-1].metrics
