"""`mmpretrain gate`: the four-modality gate, which proves that training uses every modality and each of its objectives.

Enter: a folder. Leave: in it shards and a run for each seed, and on screen each figure of each seed beside chance and
its bound. Floors tell that something was learned. Ceilings tell that a modality is used: without it the answer cannot
be known, so a higher figure would mean that something gives it away. Figures out of bounds end with exit code 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmpretrain.config import configs_folder
from mmpretrain.demo import DemoError, Stage, last_figures, moved_paths, run_stages

SAMPLES = 4000
SEEDS = (0, 1, 2)
HOME = "runs/gate"
"""Where the paths in the config point; they move with the folder."""


@dataclass(frozen=True)
class Bound:
    """What a figure must reach, or must not exceed."""

    label: str
    figure: str
    guess: str
    """What can be known by guessing, or without the modality."""
    floor: float | None = None
    ceiling: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the figure is in bounds; a NaN never is."""
        return value >= self.floor if self.floor is not None else self.ceiling is not None and value <= self.ceiling


BOUNDS = (
    Bound("picture -> its words, of 36", "image/zeroshot_top1", ".028", floor=0.75),
    Bound("video -> its words, of 144", "video/zeroshot_top1", ".007", floor=0.75),
    Bound("recording -> its words, of 8", "audio/zeroshot_top1", ".125", floor=0.95),
    Bound("answer from all four, of 12", "val/answer_acc", ".083", floor=0.85),
    Bound("answer without the recording", "val/answer_acc_no_audio", ".50", ceiling=0.57),
    Bound("answer without the question", "val/answer_acc_no_question", ".50", ceiling=0.57),
    Bound("answer without the picture", "val/answer_acc_no_image", ".60", ceiling=0.66),
    Bound("answer without the video", "val/answer_acc_no_video", ".60", ceiling=0.66),
    Bound("picture -> its words, held-out pairs", "heldout/zeroshot_top1", ".028", floor=0.35),
    Bound("answer, held-out pairs", "heldout/answer_acc", ".083", floor=0.55),
    Bound("answer without the recording, held-out", "heldout/answer_acc_no_audio", ".50", ceiling=0.57),
)


def gate(folder: Path) -> None:
    """Train every seed by the command line's own commands; a seed that is trained already is not trained again."""
    run_stages(stages(folder))
    figures = [last_figures(_run(folder, seed)) for seed in SEEDS]
    Console().print(table(figures))
    broken = sorted({bound.label for bound in BOUNDS for found in figures if not bound.holds(found[bound.figure])})
    if broken:
        raise DemoError(f"out of bounds: {'; '.join(broken)}")


def stages(folder: Path) -> list[Stage]:
    """Shards, then all seeds side by side, each on one thread."""
    config = configs_folder() / "gate.yaml"
    making = ["mmpretrain", "data", "make", "--out", str(folder / "data"), "--samples", str(SAMPLES)]
    paths = [override for override in moved_paths(config, HOME, folder) if not override.startswith("output=")]
    training = [
        ["mmpretrain", "train", str(config), f"output={_run(folder, seed)}", f"seed={seed}", *paths] for seed in SEEDS
    ]
    return [
        ("Draw pictures and videos, record tones and write about them, as shards", [making]),
        (f"Train seeds {', '.join(map(str, SEEDS))} side by side", training),
    ]


def table(figures: Sequence[Mapping[str, float]]) -> Table:
    """The figures of all seeds; red where one is out of bounds."""
    view = Table(title="The four-modality gate")
    view.add_column("figure")
    for heading in ("chance", *(f"seed {seed}" for seed in SEEDS), "bound"):
        view.add_column(heading, justify="right")
    for bound in BOUNDS:
        wanted = f">= {bound.floor:.2f}" if bound.floor is not None else f"<= {bound.ceiling:.2f}"
        values = [found[bound.figure] for found in figures]
        shown = [f"[{'green' if bound.holds(value) else 'red'}]{value:.3f}[/]" for value in values]
        view.add_row(bound.label, bound.guess, *shown, wanted)
    return view


def _run(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"
