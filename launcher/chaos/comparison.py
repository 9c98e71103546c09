"""A run that was broken against one that was not: the same losses, bitwise, and the same samples, each once.

Enter: both runs' rows. Leave: what differs, in words. Steps after a loss that was not finite are compared by their
samples alone: a skipped step leaves its weights as they are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.chaos.subject import Row, Subject


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what was found."""

    losses: int
    """Steps whose losses were compared."""
    other_losses: tuple[int, ...]
    """Steps at which they differ."""
    samples: int
    """Steps whose samples were compared."""
    other_samples: tuple[int, ...]
    lost: tuple[int, ...]
    """Steps whose samples the run never saw."""
    twice: tuple[int, ...]
    """Steps that its surviving trajectory holds more than once."""

    @property
    def is_equal(self) -> bool:
        return not (self.other_losses or self.other_samples or self.lost or self.twice)

    def __str__(self) -> str:
        return (
            f"{self.losses} losses compared bitwise with those of an uninterrupted run: "
            f"{_differing(self.other_losses)}\n"
            f"samples of {self.samples} steps compared, key by key: {_differing(self.other_samples)}; "
            f"{len(self.lost)} steps lost, {len(self.twice)} seen twice by the surviving trajectory"
        )


def compare(broken: Subject, whole: Subject, skipped: Sequence[int]) -> Comparison:
    """Over all steps that both did; losses before the first step that the broken run skipped."""
    ours, theirs = broken.losses(), whole.losses()
    end = min(min(skipped, default=len(theirs) + 1), len(theirs) + 1, len(ours) + 1)
    rows, right = broken.rows("samples.jsonl"), _by_step(whole.rows("samples.jsonl"))
    keys = _by_step(rows)
    common = range(1, min(max(keys, default=0), max(right, default=0)) + 1)
    return Comparison(
        losses=end - 1,
        other_losses=tuple(step for step in range(1, end) if ours.get(step) != theirs.get(step)),
        samples=len(common),
        other_samples=tuple(step for step in common if step in keys and keys[step] != right.get(step)),
        lost=tuple(step for step in common if step not in keys),
        twice=_repeated([_step(row) for row in rows]),
    )


def _by_step(rows: Sequence[Row]) -> dict[int, object]:
    return {_step(row): row["keys"] for row in rows}


def _step(row: Row) -> int:
    return int(str(row["step"]))


def _repeated(steps: Sequence[int]) -> tuple[int, ...]:
    return tuple(step for step, times in Counter(steps).items() if times > 1)


def _differing(steps: Sequence[int]) -> str:
    return f"{len(steps)} DIFFER, first at step {steps[0]}" if steps else "all equal"
