"""`mmpretrain demo`: synthetic shards of four modalities -> pretrain -> evaluate -> report -> publish, as by hand.

Enter: a folder. Leave: in it shards, a run with its report, a published model, and on screen figures beside chance.
Refused: a folder that holds another demo half done is continued; figures below their gates end with exit code 1.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from subprocess import PIPE, STDOUT

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.core.errors import MMPretrainError
from mmpretrain.tracking.record import read_metrics

SAMPLES = 6000
RANKS = 2
HOME = "runs/demo"
"""Where the paths in the config point; they move with the folder."""


@dataclass(frozen=True)
class Gate:
    """A figure that a model which learned its task exceeds."""

    label: str
    figure: str
    chance: str
    """What guessing gives: a number, or the name of the figure that measures it."""
    floor: float


GATES = (
    Gate("name the shape in a picture, of 36 kinds", "image/zeroshot_top1", "image/zeroshot_chance", 0.70),
    Gate("name the shape and its motion in a video, of 144", "video/zeroshot_top1", "video/zeroshot_chance", 0.70),
    Gate("name the pitch of a tone, of 8", "audio/zeroshot_top1", "audio/zeroshot_chance", 0.95),
    Gate("name shapes in colours never shown together", "heldout/zeroshot_top1", "heldout/zeroshot_chance", 0.35),
    Gate("find a caption of the picture, R@1", "val/i2t_r@1", "val/i2t_chance_r@1", 0.60),
    Gate("find a picture for the caption, R@1", "val/t2i_r@1", "val/t2i_chance_r@1", 0.60),
    Gate("fill in hidden words, seeing the picture", "val/mlm_acc", "val/mlm_acc_shuffled", 0.80),
    Gate("answer a question, of 12 answers", "val/answer_acc", "val/answer_acc_guess", 0.80),
    Gate("the same, about combinations never shown", "heldout/answer_acc", "heldout/answer_acc_guess", 0.50),
)


Command = list[str]
"""As a user would type it."""
Stage = tuple[str, list[Command]]
"""A title, and the commands that run side by side, one thread each."""


class DemoError(MMPretrainError):
    """The demo ran, and the model learned less than it should have."""


def demo(folder: Path) -> None:
    """Run every stage by the command line's own commands; what is done already is not done again."""
    run_stages(stages(folder))
    figures = last_figures(folder / "run")
    Console().print(table(figures))
    Console().print(f"report     {folder / 'run' / 'report.html'}\npublished  {folder / 'published'}", soft_wrap=True)
    low = [gate.label for gate in GATES if figures[gate.figure] < gate.floor]
    if low:
        raise DemoError(f"below the gate: {'; '.join(low)}")


def stages(folder: Path) -> list[Stage]:
    """Shards, a run, its report and a published model."""
    data, run, config = folder / "data", folder / "run", configs_folder() / "demo.yaml"
    training = ["torchrun", "--standalone", "--nproc-per-node", str(RANKS), "-m", "mmpretrain.train", str(config)]
    published = folder / "published"
    publishing = ["mmpretrain", "publish", str(run), "--to-dir", str(published), "--license", "apache-2.0"]
    return [
        (
            "Draw pictures and videos, record tones and write about them, as shards",
            [["mmpretrain", "data", "make", "--out", str(data), "--samples", str(SAMPLES)]],
        ),
        (f"Pretrain on {RANKS} ranks under ZeRO-2", [training + moved_paths(config, HOME, folder)]),
        ("Write the report page", [["mmpretrain", "report", str(run)]]),
        *([] if published.exists() else [("Publish, and verify in a fresh process", [publishing])]),
    ]


def run_stages(planned: Sequence[Stage]) -> None:
    """One stage after the other; DemoError where a command fails."""
    console = Console(stderr=True, highlight=False)
    for title, commands in planned:
        lines = "\n".join(f"$ {escape(shlex.join(command))}" for command in commands)
        console.print(f"\n[bold]{title}[/bold]\n[dim]{lines}[/dim]", soft_wrap=True)
        codes = [_run(commands[0])] if len(commands) == 1 else _run_side_by_side(commands, console)
        for command, code in zip(commands, codes, strict=True):
            if code:
                raise DemoError(f"`{shlex.join(command)}` ended with exit code {code}; its message is above")


def _run(command: Command) -> int:
    return subprocess.run(_runnable(command), env=_environment(), check=False).returncode


def _run_side_by_side(commands: Sequence[Command], console: Console) -> list[int]:
    """Exit codes; every line that a command writes begins with its number, counted from 0."""

    def run(number: int) -> int:
        started = subprocess.Popen(
            _runnable(commands[number]), env=_environment(), stdout=PIPE, stderr=STDOUT, text=True, errors="replace"
        )
        assert started.stdout is not None
        for line in started.stdout:
            console.print(f"{number} | {line.rstrip()}", markup=False, soft_wrap=True)
        return started.wait()

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(run, range(len(commands))))


def moved_paths(config: Path, home: str, folder: Path) -> list[str]:
    """Overrides that make every path of a run file that begins with `home` begin with `folder`."""
    if folder == Path(home):
        return []
    found = _leaves(load_run_config(config).model_dump(mode="json"), ())
    return [
        f"{'.'.join(path)}={_moved(value, home, folder)}"
        for path, value in found
        if home in {str(parent) for text in _texts(value) for parent in PurePath(text).parents}
    ]


def _leaves(tree: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, (*path, name))


def _texts(value: object) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _moved(value: object, home: str, folder: Path) -> str:
    moved = [str(folder / PurePath(text).relative_to(home)) for text in _texts(value)]
    return f"[{', '.join(moved)}]" if isinstance(value, list) else moved[0]


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


def _runnable(command: Command) -> list[str]:
    """The command by this interpreter, whatever is on PATH."""
    modules = {"torchrun": "torch.distributed.run", "mmpretrain": "mmpretrain"}
    return [sys.executable, "-m", modules[command[0]], *command[1:]]


def _environment() -> dict[str, str]:
    """One thread a rank: two ranks with all threads each run many times slower."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def last_figures(run: Path) -> Mapping[str, float]:
    """The newest evaluation of a run."""
    return [row for row in read_metrics(run) if not row.is_training][-1].metrics
