"""The training loop: batches in, one engine step each, a report to every hook, checkpoints where hooks ask for them.

Enter: the parts that `build` joined. Leave: whether the run completed or was asked to stop.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from mmpretrain.core.types import Batch, StepReport
from mmpretrain.training.engine import Engine
from mmpretrain.training.hooks import Hook, Verdict
from mmpretrain.training.reporting import Reporter


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of; nothing here knows the loop."""

    engine: Engine
    batches: Iterable[list[Batch]]
    """From the first step that is still to do: per step, this rank's micro-batches."""
    learning_rate: Callable[[int], float]
    reporter: Reporter
    hooks: Sequence[Hook]
    save: Callable[[int], None]
    """Begin a checkpoint after so many steps. Communicates."""
    settle: Callable[[], None]
    """Wait until the newest checkpoint is valid. Communicates."""
    evaluate: Callable[[StepReport], None]
    """Evaluate the live model, after the save, so that a failure costs no steps. Communicates."""
    start_step: int
    last_step: int


def fit(parts: Parts) -> int:
    """Train from `start_step` to `last_step`, or until a hook says STOP; returns the number of steps done."""
    step = parts.start_step
    for batches in parts.reporter.timed(parts.batches):
        lr = parts.learning_rate(step)
        result = parts.engine.step(batches, lr)
        step += 1
        report = parts.reporter.report(step, lr, batches, result)
        verdict = ask(parts.hooks, report)
        if Verdict.SAVE in verdict:
            parts.save(step)
        if Verdict.EVALUATE in verdict:
            parts.settle()
            parts.evaluate(report)
        if Verdict.STOP in verdict or step == parts.last_step:
            break
        parts.reporter.forget_pause()
    parts.settle()
    return step


def ask(hooks: Sequence[Hook], report: StepReport) -> Verdict:
    """All hooks' verdicts on a report, joined."""
    return reduce(or_, [hook(report) for hook in hooks], Verdict.NOTHING)
