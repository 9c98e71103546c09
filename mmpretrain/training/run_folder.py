"""The files of a run folder that are not metrics: config, attempts, outcome, heartbeat and control files.

Enter: the `output` of a run. Leave: files another process can read at any time, since each is replaced whole.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmpretrain.core.errors import ClusterError

State = Literal["completed", "preempted", "fatal"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; only the main rank writes."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def begin_attempt(self, world_size: int, device: str) -> int:
        """Make the folder, forget the last outcome, and return this attempt's number, from 0."""
        try:
            for folder in (self.path, self.path / "control", self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            (self.path / "outcome.json").unlink(missing_ok=True)
            attempt = self.attempts()
            with (self.path / "attempts.jsonl").open("a") as file:
                row = {"attempt": attempt, "time": time.time(), "ranks": world_size, "device": device}
                file.write(json.dumps(row) + "\n")
        except OSError as fault:
            raise ClusterError(
                f"the run folder {self.path} cannot be written ({fault.strerror}); set output to a writable folder"
            ) from fault
        return attempt

    def attempts(self) -> int:
        """Number of attempts begun so far."""
        path = self.path / "attempts.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

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

    def write_outcome(self, state: State, step: int, message: str) -> None:
        """How this attempt ended; its absence means that it crashed."""
        content = {"state": state, "step": step, "message": message, "time": time.time()}
        self._replace("outcome.json", json.dumps(content) + "\n")

    def write_heartbeat(self, step: int, phase: str) -> None:
        """What the main rank does now: "step", "save" or "evaluate"."""
        self._replace("heartbeat.json", json.dumps({"step": step, "phase": phase, "time": time.time()}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop rows past `step` from the traces of an attempt that went further than its last checkpoint.

        metrics.jsonl keeps them: it tells what happened, attempt by attempt.
        """
        for name in ("samples.jsonl", "skipped.jsonl"):
            path = self.path / name
            if path.exists():
                rows = path.read_text().split("\n")[:-1]
                kept = [row for row in rows if json.loads(row)["step"] <= step]
                self._replace(name, "".join(f"{row}\n" for row in kept))

    def take_control(self, name: str) -> bool:
        """Whether the control file `name` was there; it is removed."""
        path = self.path / "control" / name
        if not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True

    def _replace(self, name: str, content: str) -> None:
        partial = self.path / f".{name}.{os.getpid()}.partial"  # ranks that fail alike write at the same time
        partial.write_text(content)
        partial.replace(self.path / name)
