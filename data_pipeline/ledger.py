"""The ledger of samples that were not used, and the budget past which a run stops.

Enter: the skips of every step, from all ranks. Leave: `ledger.jsonl`, append only, one line per skip whatever restarts
replay. Refused: a run whose skips exceed the budget, naming shards and keys.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mmpretrain.core.errors import DataError
from mmpretrain.core.run_files import record_of, whole_rows
from mmpretrain.core.types import Skip, StepReport

BUDGET_MIN_SAMPLES = 1000
"""The share of bad samples is taken over at least so many, so that one early fault does not stop a run."""

_SHARDS_NAMED = 5


class Ledger:
    """All skips of a run. Every rank keeps one and is given the skips of all ranks, so that all stop alike.

    One rank writes the file.
    """

    def __init__(self, path: Path, budget: float, writes: bool = True) -> None:
        self._path = path
        self._budget = budget
        self._writes = writes
        if writes:
            _drop_cut_line(path)
        self._skips = dict.fromkeys(read_ledger(path))

    @property
    def skips(self) -> tuple[Skip, ...]:
        return tuple(self._skips)

    def add_report(self, report: StepReport) -> None:
        """Note the skips of a step and refuse to go on past the budget."""
        self.add(report.skips)
        self.check(report.samples)

    def add(self, skips: Iterable[Skip]) -> None:
        """Append what is new; a step that is replayed after a restart reports the same skips again."""
        new = [skip for skip in dict.fromkeys(skips) if skip not in self._skips]
        self._skips.update(dict.fromkeys(new))
        if new and self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(_line(skip) for skip in new))

    def check(self, samples: int) -> None:
        """Refuse to go on where more than the budgeted share of the `samples` seen so far was skipped."""
        base = max(samples, BUDGET_MIN_SAMPLES)
        if len(self._skips) > self._budget * base:
            raise DataError(
                f"{len(self._skips)} unusable samples after {samples}, more than data.bad_sample_budget "
                f"{self._budget:g} of {base}: {_by_shard(self._skips)}; look at the shards with `mmpretrain data "
                f"check`, mend or remove them, or raise the budget"
            )


def read_ledger(path: Path) -> list[Skip]:
    """The skips a ledger holds, without a last line that a crash cut off."""
    try:
        return [record_of(Skip, row) for row in whole_rows(path)]
    except ValueError as error:
        raise DataError(f"{path} holds a row that is no skip ({error}); mend or remove it") from error


def _drop_cut_line(path: Path) -> None:
    """So that the next line does not continue it; its step is replayed."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _line(skip: Skip) -> str:
    return json.dumps(asdict(skip), ensure_ascii=False) + "\n"


def _by_shard(skips: Iterable[Skip]) -> str:
    """The shards with most skips, each with one key and reason."""
    examples = {skip.shard: skip for skip in skips}
    counts = Counter(skip.shard for skip in skips)
    named = [
        f"{shard} ({count}; {examples[shard].key}: {examples[shard].reason})"
        for shard, count in counts.most_common(_SHARDS_NAMED)
    ]
    rest = len(counts) - len(named)
    return "; ".join(named) + (f"; and {rest} more shards" if rest else "")
