"""The small files by which a training process and whoever watches it talk, in the run folder both see.

Enter: the path of a run folder. Leave: the outcome, heartbeat, ranks and last step that stand there; None for what is
absent, half written or no such record: whoever may write the folder may not stop who reads it. Each file is replaced
whole, so a reader never waits for a writer.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json

RecordT = TypeVar("RecordT")

State = Literal["completed", "preempted", "fatal"]
Phase = Literal["start", "step", "save", "evaluate"]

OUTCOME, HEARTBEAT, METRICS, ATTEMPTS = "outcome.json", "heartbeat.json", "metrics.jsonl", "attempts.jsonl"
CONTROL, RANKS, STACKS, CHECKPOINTS = "control", "ranks", "stacks", "checkpoints"
LEDGER, CONSUMED = "ledger.jsonl", "consumed.jsonl"
CHECKPOINT_EVENTS = "checkpoints.jsonl"
"""What became of checkpoints: rows of step, event (valid, uploaded, upload failed) and time."""
MANIFEST, CONFIG = "manifest.json", "config.yaml"
"""Of a checkpoint."""

PICTURES = "pictures.json"
"""In `evaluation/`: what the newest evaluation left to look at, {name: [{"file", "caption"}]}."""

LATEST_TIME = 253_402_300_799.0
"""Seconds since 1970 until the year 10000, which no clock shows."""
_LARGEST = 1e100
_TAIL_BYTES = 65536
_REQUEST_BYTES = 4096


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, by its own word; there is none after a crash."""

    state: State
    step: int
    message: str
    reason: str
    """Who asked for the stop: the text of control/stop, or the signal; empty for ends that nobody asked for."""
    time: float
    """Seconds since 1970."""
    asked: float | None = None
    """When the stop was asked for, seconds since 1970; None where nobody asked."""


@dataclass(frozen=True)
class Heartbeat:
    """What the main rank does now."""

    step: int
    """Steps finished."""
    last_step: int
    """Steps of the whole run."""
    phase: Phase
    attempt: int
    """Number of this start of the run, from 0."""
    loss: float | None
    """Of the newest step; None before the first, or where it is not finite."""
    step_s: float | None
    """Seconds of the newest step."""
    samples_per_s: float | None
    time: float
    save_s: float | None = None
    """Seconds that the newest checkpoint of this attempt takes where it is waited for; None before the first."""


@dataclass(frozen=True)
class RankProcess:
    """Where one rank runs, so that a supervisor can reach it."""

    rank: int
    pid: int
    node: str
    """As the scheduler names it, or the host's name."""
    started: float


def node_name() -> str:
    """This node, as the scheduler names it; virtual nodes share a host."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def read_outcome(run: Path) -> Outcome | None:
    return _read(Outcome, run / OUTCOME)


def read_heartbeat(run: Path) -> Heartbeat | None:
    return _read(Heartbeat, run / HEARTBEAT)


def read_ranks(run: Path) -> list[RankProcess]:
    """The ranks of the newest attempt that wrote them, in order."""
    found = [_read(RankProcess, path) for path in (run / RANKS).glob("rank-*.json")]
    return sorted((one for one in found if one is not None), key=lambda one: one.rank)


def last_step(run: Path) -> int:
    """The newest step of metrics.jsonl; 0 where there is none."""
    path = run / METRICS
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            step = parse_json(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
        if fits(step, int):
            return int(step)
    return 0


def last_saved_step(run: Path) -> int:
    """The newest step that has a checkpoint; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in saved_checkpoints(run / CHECKPOINTS)), default=0)


def saved_checkpoints(folder: Path) -> list[Path]:
    """What is named as a checkpoint in a folder of them, the newest last; anything else that stands there is none."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def stack_file(run: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it is sent SIGUSR2."""
    return run / STACKS / f"rank-{rank}.txt"


def read_request(path: Path) -> str | None:
    """The text of a control file; None where there is none. Others may write there: what is no file is no request."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(_REQUEST_BYTES).decode(errors="replace").strip()
    except PermissionError:  # of a teammate whose files are his alone
        return ""
    except FileNotFoundError:
        return None


def ask(run: Path, request: str, reason: str = "") -> None:
    """Leave a control file, such as stop or profile:10; people of the run folder's group may as well."""
    folder = run / CONTROL
    make_control_folder(folder)
    replace(folder / request, reason)


def make_control_folder(folder: Path) -> None:
    """Writable to the group, whatever the umask, as far as this user may decide it."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(folder.stat().st_mode | 0o2070)


def replace(path: Path, content: str) -> None:
    """Write a file whole, or leave it as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # ranks that fail alike write at the same time
    try:
        partial.write_text(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_record(path: Path, record: Outcome | Heartbeat | RankProcess) -> None:
    replace(path, json.dumps(asdict(record)) + "\n")


def this_rank(rank: int) -> RankProcess:
    return RankProcess(rank, os.getpid(), node_name(), time.time())


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file of a run, without a last line that a kill cut off; none where there is no file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{place} is no row that a run wrote ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is no row that a run wrote, but a {type(row).__name__}; mend or remove the line")
    return row


def record_of(kind: type[RecordT], content: object) -> RecordT:
    """A record from its JSON; ValueError says which field is no such thing.

    Fields that this version does not know are left out: a run keeps its code while what watches it may change.
    """
    if not isinstance(content, dict):
        raise ValueError(f"saw a {type(content).__name__}, expected an object")
    types = _types_of(kind)  # type: ignore[arg-type]  # mypy doubts that a class can be hashed
    values = {name: value for name, value in content.items() if name in types}
    for name, value in values.items():
        if not fits(value, types[name]):
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except TypeError as error:
        raise ValueError(str(error)) from error


@cache
def _types_of(kind: type[object]) -> dict[str, Any]:
    return get_type_hints(kind)


def fits(value: object, wanted: Any) -> bool:
    """Whether a value out of JSON is of the type of a field, and a number one that can be computed with."""
    if isinstance(wanted, UnionType):
        return any(fits(value, one) for one in get_args(wanted))
    if get_origin(wanted) is Literal:
        return value in get_args(wanted)
    if get_origin(wanted) is tuple:
        return isinstance(value, list) and all(fits(one, get_args(wanted)[0]) for one in value)
    if type(value) is int and wanted in (int, float):
        return abs(value) < 1 << 63
    return type(value) is wanted and (not isinstance(value, float) or abs(value) < _LARGEST)


def _read(kind: type[RecordT], path: Path) -> RecordT | None:
    try:
        return record_of(kind, parse_json(path.read_text()))
    except (OSError, ValueError):
        return None
