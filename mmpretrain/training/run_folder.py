"""The files of a run folder that are not metrics: config, attempts, outcome, heartbeat and control files.

Enter: the `output` of a run. Leave: files another process can read at any time, since each is replaced whole.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError, DataError
from mmpretrain.core.run_files import Heartbeat, Outcome, Phase, State
from mmpretrain.core.types import StepReport
from mmpretrain.training.run_lock import lock_run

__all__ = ["RunFolder", "State"]

log = logging.getLogger(__name__)
_NO_HEARTBEAT = Heartbeat(0, 0, "start", 0, None, None, None, 0.0)


@dataclass(frozen=True)
class Before:
    """What a run's folder says of it."""

    outcome: Outcome | None
    heartbeat: Heartbeat | None


@dataclass
class RunFolder:
    """Paths of one run; only the main rank writes."""

    path: Path
    _heartbeat: Heartbeat = field(default=_NO_HEARTBEAT, repr=False)
    before: Before | None = None
    """How its run stood when this attempt began."""

    @property
    def checkpoints(self) -> Path:
        return self.path / run_files.CHECKPOINTS

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def control(self) -> Path:
        return self.path / run_files.CONTROL

    def begin_attempt(self, world_size: int, device: str, last_step: int) -> int:
        """Lock the folder, which is made, put the last outcome aside, and return this attempt's number, from 0."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock_run(self.path)
            self.before = Before(run_files.read_outcome(self.path), run_files.read_heartbeat(self.path))
            for folder in (self.path / run_files.RANKS, self.path / run_files.STACKS, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            run_files.make_control_folder(self.control)
            (self.path / run_files.OUTCOME).unlink(missing_ok=True)
            for old in (self.path / run_files.RANKS).glob("rank-*.json"):
                old.unlink(missing_ok=True)
            attempt = self.attempts()
            with (self.path / run_files.ATTEMPTS).open("a") as file:
                row = {"attempt": attempt, "time": time.time(), "ranks": world_size, "device": device}
                file.write(json.dumps(row) + "\n")
            self._beat(replace(_NO_HEARTBEAT, last_step=last_step, attempt=attempt))
        except OSError as fault:
            raise ClusterError(
                f"the run folder {self.path} cannot be written ({fault.strerror}); set output to a writable folder"
            ) from fault
        return attempt

    def refuse_attempt(self, message: str) -> None:
        """Of an attempt that could not be built. A run that had ended still has; one that a supervisor started again,
        which takes the outcome away, is given up. From any rank."""
        before = self.before or Before(run_files.read_outcome(self.path), None)
        if before.outcome is None:
            step = 0 if before.heartbeat is None else before.heartbeat.step
            self.write_outcome("fatal", step, message)
            return
        run_files.write_record(self.path / run_files.OUTCOME, before.outcome)
        if before.heartbeat is not None:
            run_files.write_record(self.path / run_files.HEARTBEAT, before.heartbeat)

    def begin_steps(self, step: int) -> None:
        """The heartbeat of an attempt that is built, with so many steps done."""
        last = None if self.before is None else self.before.heartbeat
        figures = last if last is not None and last.step == step else _NO_HEARTBEAT
        known = {name: getattr(figures, name) for name in ("loss", "step_s", "samples_per_s")}
        self._beat(replace(self._heartbeat, step=step, **known))

    def attempts(self) -> int:
        """Number of attempts begun so far."""
        path = self.path / run_files.ATTEMPTS
        return len(path.read_bytes().splitlines()) if path.is_file() else 0

    def write_config(self, config_yaml: str) -> None:
        """`config.yaml`: the resolved config of the newest attempt that could begin."""
        self._replace("config.yaml", config_yaml)

    def write_sources(self, sources: Sequence[Mapping[str, object]]) -> None:
        """`data.json`: what the run reads, for its card."""
        self._replace("data.json", json.dumps(list(sources)) + "\n")

    def write_parent(self, parent: Mapping[str, object]) -> None:
        """`parent.json`: the model a fine-tuning run began from, and what it took over."""
        self._replace("parent.json", json.dumps(parent, indent=1) + "\n")

    def read_parent(self) -> dict[str, object] | None:
        """What `write_parent` wrote; None for a run that began from scratch."""
        path = self.path / "parent.json"
        found: dict[str, object] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def write_outcome(
        self, state: State, step: int, message: str, reason: str = "", asked: float | None = None
    ) -> None:
        """How this attempt ended; its absence means that it crashed."""
        run_files.write_record(self.path / run_files.OUTCOME, Outcome(state, step, message, reason, time.time(), asked))

    def write_rank(self, rank: int) -> None:
        """Where this rank runs. The one file that every rank writes."""
        run_files.write_record(self.path / run_files.RANKS / f"rank-{rank}.json", run_files.this_rank(rank))

    def beat(self, report: StepReport) -> None:
        """The heartbeat after a step."""
        loss = report.metrics["train/loss"]
        self._beat(
            replace(
                self._heartbeat,
                step=report.step,
                phase="step",
                loss=loss if math.isfinite(loss) else None,
                step_s=report.metrics["perf/step_s"],
                samples_per_s=report.metrics["perf/samples_per_s"],
            )
        )

    @contextmanager
    def phase(self, name: Phase, step: int) -> Iterator[None]:
        """Say that the main rank saves or evaluates, and afterwards that it steps again: each has its time limit."""
        self._beat(replace(self._heartbeat, step=step, phase=name))
        yield
        self._beat(replace(self._heartbeat, phase="step"))

    def note_save(self, seconds: float) -> None:
        """What a checkpoint takes where it is waited for; the next heartbeat tells it."""
        self._heartbeat = replace(self._heartbeat, save_s=seconds)

    def note_checkpoint(self, step: int, event: str, **more: object) -> None:
        """A row of `checkpoints.jsonl`."""
        with (self.path / run_files.CHECKPOINT_EVENTS).open("a") as file:
            file.write(json.dumps({"step": step, "event": event, "time": time.time()} | more) + "\n")

    def uploaded_steps(self) -> set[int]:
        """Checkpoints that were uploaded, as `checkpoints.jsonl` says, and not written again since."""
        found = set[int]()
        for row in run_files.whole_rows(self.path / run_files.CHECKPOINT_EVENTS):
            if row.get("event") == "uploaded":
                found.add(_number_in(row, "step"))
            elif row.get("event") == "valid":
                found.discard(_number_in(row, "step"))
        return found

    def rewind(self, step: int, position: int) -> None:
        """Drop what an attempt that went further than its last checkpoint wrote of later steps: rows past `step` of its
        traces, and samples skipped at `position`, where the next step begins, or later.

        metrics.jsonl keeps them: it tells what happened, attempt by attempt.
        """
        for name, column, end in (
            ("samples.jsonl", "step", step + 1),
            ("skipped.jsonl", "step", step + 1),
            (run_files.CONSUMED, "step", step + 1),
            (run_files.LEDGER, "position", position),
        ):
            path = self.path / name
            if path.exists():
                rows = run_files.whole_rows(path)
                kept = [json.dumps(row, ensure_ascii=False) for row in rows if _number_in(row, column) < end]
                self._replace(name, "".join(f"{row}\n" for row in kept))

    def take_control(self, name: str) -> str | None:
        """The text of the control file `name`, which is removed; None where there is none."""
        path = self.control / name
        content = run_files.read_request(path)
        if content is not None:
            path.unlink(missing_ok=True)
        return content

    def take_numbered_control(self, name: str) -> int:
        """N of a control file `name:N`, which is removed; 0 where there is none."""
        for path in self.control.glob(f"{name}:*"):
            number = path.name.partition(":")[2]
            if path.is_file():
                path.unlink(missing_ok=True)
            if number.isdecimal():
                return int(number)
            log.warning("control/%s is not followed; write e.g. control/%s:10", path.name, name)
        return 0

    def _beat(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = replace(heartbeat, time=time.time())
        run_files.write_record(self.path / run_files.HEARTBEAT, self._heartbeat)

    def _replace(self, name: str, content: str) -> None:
        run_files.replace(self.path / name, content)


def _number_in(row: Mapping[str, object], column: str) -> int:
    """What a row of a run's own files counts."""
    number = row.get(column)
    if not isinstance(number, int):
        raise DataError(f"a row of the run counts no {column}: {str(row)[:80]}; mend or remove it")
    return number
