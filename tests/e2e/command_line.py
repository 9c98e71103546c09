"""The command line as a user drives it: arguments in, an exit code, stdout and stderr out, signals on the way.

Every end is checked for a traceback, which no user's mistake may produce.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch import rank_environment
from torch.distributed import TCPStore

import mmpretrain

DEADLINE_S = 240
PACKAGE = Path(mmpretrain.__path__[0])
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The error messages, one a line, without what else was logged."""
        return [line for line in self.stderr.splitlines() if "error: " in line]


class Process:
    """A command that runs; `wait` says how it ended."""

    def __init__(self, pid: int, logs: Path, wait: Callable[[], int], by_torchrun: bool = False) -> None:
        self.pid = pid
        self._logs = logs
        self._wait = wait
        self._by_torchrun = by_torchrun

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        code = self._wait()
        ended = Ended(code, (self._logs / "stdout").read_text(), (self._logs / "stderr").read_text())
        assert not _traceback(ended.stderr, self._by_torchrun), ended.stderr
        return ended


def _traceback(stderr: str, by_torchrun: bool) -> bool:
    """Whether a traceback is ours: torchrun prints one of its own when it is stopped or a rank fails."""
    return f'File "{PACKAGE}' in stderr if by_torchrun else "Traceback" in stderr


class WarmCommand:
    """Starts commands as forks of a process that has already imported everything (see warm_start.py)."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("warm_start.py")
        self._server = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def start(
        self,
        arguments: Iterable[str],
        logs: Path,
        environment: Mapping[str, str] | None = None,
        max_file_bytes: int | None = None,
    ) -> Process:
        logs.mkdir(parents=True, exist_ok=True)
        limits = {"environment": environment or {}, "max_file_bytes": max_file_bytes}
        pid = self._ask({"start": list(arguments), "logs": str(logs), **limits})
        return Process(pid, logs, lambda: self._ask({"wait": pid}))

    def close(self) -> None:
        self._server.communicate(timeout=DEADLINE_S)

    def _ask(self, request: Mapping[str, object]) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        reply = self._server.stdout.readline()
        assert reply, "the warm process ended"
        return int(reply)


def start_torchrun(arguments: Iterable[str | Path], logs: Path, ranks: int) -> Process:
    """Start ranks of `mmpretrain` as a shell would."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "stdout").open("w") as stdout, (logs / "stderr").open("w") as stderr:
        command = [*torchrun, "-m", "mmpretrain", *arguments]
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=ENVIRONMENT)
    return Process(process.pid, logs, lambda: process.wait(DEADLINE_S), by_torchrun=True)


@dataclass(frozen=True)
class Project:
    """A folder with a run file, a copy of the synthetic shards, and the run's output in `output`."""

    folder: Path
    warm: WarmCommand

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.output / "checkpoints").iterdir())

    def start(self, *overrides: str, max_file_bytes: int | None = None) -> Process:
        return self.warm.start(["train", str(self.config), *overrides], self.logs, max_file_bytes=max_file_bytes)

    def train_ranks(self, ranks: int, *overrides: str) -> list[Ended]:
        """How each rank of a group ended, of which none is stopped because another failed."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = ["train", str(self.config), *overrides]
        started = [
            self.warm.start(arguments, self.logs / str(rank), rank_environment(rank, ranks, store.port))
            for rank in range(ranks)
        ]
        return [process.wait() for process in started]

    def train(self, *overrides: str, max_file_bytes: int | None = None) -> Ended:
        return self.start(*overrides, max_file_bytes=max_file_bytes).wait()

    def outcome(self) -> tuple[str, int]:
        """State and step of outcome.json."""
        outcome = json.loads((self.output / "outcome.json").read_text())
        return outcome["state"], outcome["step"]

    def rows(self, name: str) -> list[dict[str, object]]:
        """The finished rows of a .jsonl file of the run."""
        return rows_of(self.output / name)

    def losses(self) -> dict[object, object]:
        return losses_of(self.output)


def rows_of(path: Path) -> list[dict[str, object]]:
    """The finished rows of a .jsonl file; none where there is no file yet."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses_of(output: Path) -> dict[object, object]:
    """Step -> loss of the newest attempt that reached it."""
    return {row["step"]: row["train/loss"] for row in rows_of(output / "metrics.jsonl")}


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll until `condition` holds; fails after a deadline, naming what did not happen."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S} s"
        time.sleep(0.005)


def flip_middle_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
