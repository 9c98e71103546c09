"""Everything a run folder tells, as typed facts for its report.

Enter: a run folder, whole or partial. Leave: `RunStory`; files that are absent leave their facts empty. Refuses a
folder without a single step, naming what to look at instead, and files that hold something else than a run writes.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.run_files import LATEST_TIME, fits
from mmpretrain.core.types import Pictures
from mmpretrain.core.yaml_source import read_text
from mmpretrain.tracking.pictures import inside, read_pictures
from mmpretrain.tracking.record import Row, read_record, surviving_rows

SIGN_OF_LIFE_S = 300.0
"""A run without outcome counts as running for so long after its last heartbeat."""


@dataclass(frozen=True)
class Attempt:
    """One start of the run, from its rows."""

    number: int
    begun: float
    """Seconds since 1970."""
    ended: float
    first_step: int
    last_step: int
    lost_steps: int
    """Steps that a later attempt had to repeat."""
    ranks: int | None


@dataclass(frozen=True)
class Retrieved:
    """A caption and the images a model found for it, best first."""

    query: str
    key: str
    images: tuple[Path, ...]
    scores: tuple[float, ...]
    correct: int | None
    """Index of the first right image; None where none was among them."""


@dataclass(frozen=True)
class RunStory:
    """What there is to tell of a run."""

    run_dir: Path
    state: str
    """completed, preempted, fatal, running or crashed."""
    message: str
    steps: tuple[Row, ...]
    """Training rows that stand."""
    evaluations: tuple[Row, ...]
    torn: int
    attempts: tuple[Attempt, ...]
    config_text: str
    config: Mapping[str, object]
    skip_reasons: Mapping[str, int]
    """Replaced samples by reason."""
    retrieved: tuple[Retrieved, ...]
    pictures: Pictures
    """What the last evaluation left to look at."""

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def training_s(self) -> float:
        """Time in all attempts, without the gaps between them."""
        return sum(attempt.ended - attempt.begun for attempt in self.attempts)

    @property
    def total_steps(self) -> int:
        """Steps the run is to have; those it has where no config tells."""
        planned = self.config.get("steps")
        return planned if isinstance(planned, int) else self.steps[-1].step


def read_story(run_dir: Path) -> RunStory:
    """Read all files of a run folder."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is no folder; name the `output` of a run")
    record = read_record(run_dir)
    rows = surviving_rows(record.rows)
    steps = tuple(row for row in rows if row.is_training)
    if not steps:
        raise DataError(
            f"{run_dir} has no finished step to report: its metrics.jsonl holds {len(record.rows)} rows of evaluations "
            f"and {record.torn} broken lines; look into {run_dir}/logs, or wait for the first step"
        )
    state, message = _state(run_dir, record.rows[-1].time)
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    return RunStory(
        run_dir=run_dir,
        state=state,
        message=message,
        steps=steps,
        evaluations=tuple(row for row in rows if not row.is_training),
        torn=record.torn,
        attempts=tuple(_attempts(run_dir, record.rows)),
        config_text=config_text,
        config=read_saved_config(config_path),
        skip_reasons=Counter(str(line["reason"]) for line in _json_lines(run_dir / "ledger.jsonl") if "reason" in line),
        retrieved=tuple(_retrieved(run_dir / "evaluation")),
        pictures=read_pictures(run_dir),
    )


def _state(run_dir: Path, last_row: float) -> tuple[str, str]:
    outcome = _json_object(run_dir / "outcome.json")
    if "state" in outcome:
        return str(outcome["state"]), str(outcome.get("message", ""))
    beat = _json_object(run_dir / "heartbeat.json").get("time")
    silent_s = time.time() - max(last_row, _time(beat) or 0.0)
    if silent_s < SIGN_OF_LIFE_S:
        return "running", ""
    return "crashed", "The last attempt ended without an outcome: it was killed, or its machine was lost."


def _attempts(run_dir: Path, rows: tuple[Row, ...]) -> Iterator[Attempt]:
    begun = {
        line["attempt"]: line for line in _json_lines(run_dir / "attempts.jsonl") if fits(line.get("attempt"), int)
    }
    for number in dict.fromkeys(row.attempt for row in rows):
        own = [row for row in rows if row.attempt == number]
        steps = [row.step for row in own if row.is_training] or [own[0].step]
        resumed = [row.step for row in rows if row.attempt > number and row.is_training]
        start, ranks = _time(begun.get(number, {}).get("time")), begun.get(number, {}).get("ranks")
        yield Attempt(
            number=number,
            begun=_begin_of(own[0]) if start is None else start,
            ended=own[-1].time,
            first_step=steps[0],
            last_step=steps[-1],
            lost_steps=max(0, steps[-1] - min(resumed) + 1) if resumed else 0,
            ranks=ranks if isinstance(ranks, int) and fits(ranks, int) else None,
        )


def _time(told: object) -> float | None:
    """Seconds since 1970, where that is what a file tells."""
    return told if isinstance(told, int | float) and fits(told, float) and 0 <= told <= LATEST_TIME else None


def _begin_of(first: Row) -> float:
    """When an attempt began whose own word is lost."""
    return _time(first.time - first.metrics.get("perf/step_s", 0.0)) or first.time


def _retrieved(folder: Path) -> Iterator[Retrieved]:
    path = folder / "retrieval-samples.json"
    if not path.is_file():
        return
    try:
        for sample in parse_json(path.read_text(encoding="utf-8")):
            yield _retrieved_sample(folder, sample)
    except (ValueError, KeyError, TypeError) as fault:
        raise DataError(f"{path} is no list of what was retrieved ({fault}); evaluate the run again") from fault


def _retrieved_sample(folder: Path, sample: Mapping[str, Any]) -> Retrieved:
    scores, correct = tuple(sample["scores"]), sample["correct"]
    if not all(fits(score, float) for score in scores) or not fits(correct, int | None):
        raise ValueError("scores or places are no numbers")
    images = tuple(inside(folder, name) for name in sample["images"])
    return Retrieved(str(sample["query"]), str(sample["key"]), images, scores, correct)


def _json_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise DataError(f"{path} is no JSON ({fault}); remove it and report again") from fault
    return content if isinstance(content, dict) else {}


def _json_lines(path: Path) -> Iterator[dict[str, object]]:
    """Objects of a JSONL file; lines cut short by a kill are left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content


def read_saved_config(path: Path) -> Mapping[str, object]:
    """A run's `config.yaml` as it stands, whatever version wrote it; empty where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        content = read_text(text, str(path)).plain()
    except ConfigError as fault:
        raise DataError(f"{fault}; put the run's own config back, or remove it") from fault
    return content if isinstance(content, dict) else {}
