"""Changed shards, indexes, media, tables, configs, checkpoints and folders against every door, for so many seconds.

Enter: `--seconds` and `--seed`. Leave: a line for each door, and exit code 1 if anything was found: an exception that
is none of ours, a file, program, socket or pickle that no input may open, a hang, memory without bound, a crash. What
found it is kept in `--keep`. A child process with bounded memory does the work, and is started again when it dies.

    python tests/fuzz.py --seconds 600 --seed 1
    python tests/fuzz.py --seed 1 --again video:217
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

LIMIT_S = 10.0
"""Processor seconds of one input."""
MEMORY = 2 << 30
"""Bytes beyond what the libraries take when they are loaded."""
START_S, SILENT_S = 300.0, 60.0
"""Processor seconds after which a child that says nothing is taken for hung, at first and later on."""


WRITTEN_S = 0.2


class Hang(BaseException):
    """The limit of one input is over."""


@dataclass
class Tally:
    """What a child has done, as it writes it down several times a second."""

    used_s: float = 0.0
    """Processor time since the doors were built."""
    executions: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    """Place of the fault -> door, number and what happened."""

    def text(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def read(cls, text: str) -> "Tally":
        told = json.loads(text)
        counted = {name: Counter(told[name]) for name in ("executions", "refused", "seconds")}
        return cls(told["used_s"], **counted, findings=told["findings"])


def main() -> int:
    options = _parse()
    if options.child is not None:
        _work(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        tally = _supervise(options, Path(place))
    for name, count in sorted(tally.executions.items()):
        print(f"{name:<12} {count:>7} inputs, {tally.refused[name]:>7} refused, {tally.seconds[name]:>6.1f} s")
    print(f"{sum(tally.executions.values())} inputs, {len(tally.findings)} findings")
    for where, what in tally.findings.items():
        print(f"\n{where}\n{what}")
    return int(bool(tally.findings))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="processor seconds, start-up left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", metavar="DOOR:NUMBER", help="one input alone, with its whole traceback")
    parser.add_argument("--keep", type=Path, help="folder for inputs that found something")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _supervise(options: argparse.Namespace, place: Path) -> Tally:
    """Run children until the time is used up; one that died or hung is a finding."""
    tally = Tally()
    (place / "tally").write_text(tally.text())
    while True:
        (place / "doing").unlink(missing_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(place)]
        with (place / "stderr").open("wb") as told:  # libraries of media tell there what they think of each input
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=None if options.again else told)
        died = _wait(child, place)
        tally = Tally.read((place / "tally").read_text())
        if died is None:
            return tally
        doing = (place / "doing").read_text() if (place / "doing").exists() else "start"
        words = (place / "stderr").read_bytes()[-500:].decode(errors="replace")
        tally.findings[f"{doing} {died}"] = f"{doing}: {died}: {words}"
        _keep(options, place / "work", doing)
        door, _, number = doing.partition(":")
        tally.executions[door] = int(number or 0) + 1
        (place / "tally").write_text(tally.text())
        if options.again or doing == "start":
            return tally


def _wait(child: subprocess.Popen[bytes], place: Path) -> str | None:
    """How the child died; None where it ended by itself."""
    process, doing, seen, used = psutil.Process(child.pid), place / "doing", "", 0.0
    while True:
        try:
            code = child.wait(1.0)
            return None if code == 0 else f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        except subprocess.TimeoutExpired:
            now, changed = sum(process.cpu_times()[:2]), doing.read_text() if doing.exists() else ""
        if changed != seen:
            seen, used = changed, now
        elif now - used > (SILENT_S if changed else START_S):
            child.kill()
            child.wait()
            return "hung where no signal reaches"


def _work(options: argparse.Namespace) -> None:
    """In the child: one input after the other, the door with the least time used next."""
    from fuzz_doors import build_doors

    place: Path = options.child
    shutil.rmtree(place / "examples", ignore_errors=True)
    doors = {door.name: door for door in build_doors(place / "examples")}
    tally = Tally.read((place / "tally").read_text())
    _bound_memory()
    signal.signal(signal.SIGPROF, _on_limit)
    if options.again:
        name, _, number = options.again.partition(":")
        _enter(doors[name].enter, place, tally, name, int(number), options)
        (place / "tally").write_text(tally.text())
        return
    now = written = time.process_time()
    while tally.used_s < options.seconds:
        name, begin = min(doors, key=lambda each: tally.seconds[each]), now
        _enter(doors[name].enter, place, tally, name, tally.executions[name], options)
        now = time.process_time()
        tally.executions[name] += 1
        tally.seconds[name] += now - begin
        tally.used_s += now - begin
        if now - written > WRITTEN_S:
            (place / "tally").write_text(tally.text())
            written = now
    (place / "tally").write_text(tally.text())


def _bound_memory() -> None:
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _on_limit(number: int, frame: FrameType | None) -> None:
    raise Hang


def _enter(
    enter: Callable[[Path, random.Random], object],
    place: Path,
    tally: Tally,
    name: str,
    number: int,
    options: argparse.Namespace,
) -> None:
    """One input; whatever it brings about besides a refusal is a finding."""
    from guard import only_within

    from mmpretrain.core.errors import MMPretrainError, SampleError

    work = place / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (place / "doing").write_text(f"{name}:{number}")
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        with only_within(place):
            enter(work, random.Random(f"{options.seed}:{name}:{number}"))
    except (MMPretrainError, SampleError) as refusal:
        tally.refused[name] += 1
        if not str(refusal).strip():
            tally.findings[f"{name}: refused without a word"] = f"{name}:{number}"
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever comes is what is looked for
        where = _where(error)
        if where not in tally.findings:
            tally.findings[where] = f"{name}:{number}: {type(error).__name__}: {str(error)[:300]}"
            _keep(options, work, f"{name}:{number}")
        if options.again:
            traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _where(error: BaseException) -> str:
    """The innermost line of this project that the fault passed."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    inside = [frame for frame in own if "/tests/" not in frame.filename and "/lib/python" not in frame.filename]
    frame = (inside or own)[-1]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno}"


def _keep(options: argparse.Namespace, work: Path, doing: str) -> None:
    if options.keep is not None and work.is_dir():
        shutil.copytree(work, options.keep / doing.replace(":", "-"), dirs_exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
