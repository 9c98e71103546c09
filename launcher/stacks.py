"""The stacks of all ranks, as faulthandler wrote them, and which rank is not where the others are.

Enter: stack files. Leave: each rank's innermost frames of its main thread, and a sentence that names the odd rank.
"""

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmpretrain.core import run_files
from mmpretrain.core.run_files import RankProcess

_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x")
_WAITING = ("distributed_c10d.py", "torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def main_thread(text: str) -> tuple[Frame, ...]:
    """Frames of the thread that ran Python's main program in the newest dump of a file, innermost first."""
    threads: list[list[Frame]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (match := _FRAME.match(line)):
            threads[-1].append(Frame(match["file"], int(match["line"]), match["function"]))
    programs = [frames for frames in threads if frames and frames[-1].function in ("<module>", "_run_module_as_main")]
    return tuple(programs[-1]) if programs else ()


def waits(frames: tuple[Frame, ...]) -> bool:
    """Whether a rank waits for others: some of its innermost frames are of a collective."""
    return any(part in frame.file for frame in frames[:6] for part in _WAITING)


def odd_ranks(stacks: Mapping[int, tuple[Frame, ...]]) -> list[int]:
    """Ranks that keep the others waiting: those outside a collective while others are in one, else those elsewhere."""
    told = {rank: frames for rank, frames in stacks.items() if frames}
    waiting = [rank for rank, frames in told.items() if waits(frames)]
    if waiting and len(waiting) < len(stacks):
        return sorted(set(stacks) - set(waiting))
    places = Counter(_place(frames) for frames in told.values())
    if not places or len(places) == 1:
        return sorted(set(stacks) - set(told))
    usual = places.most_common(1)[0]
    return sorted(rank for rank in stacks if rank not in told or _place(told[rank]) != usual[0])


def describe(stacks: Mapping[int, tuple[Frame, ...]], ranks: Mapping[int, RankProcess]) -> str:
    """The sentence for the history: who is where, and where the rest waits."""
    odd = odd_ranks(stacks)
    if not odd:
        return "all ranks stand in the same place"
    parts = []
    for rank in odd[:4]:
        where = f"is at {stacks[rank][0]}" if stacks[rank] else "is gone, or cannot tell where it is"
        parts.append(f"rank {rank} on {ranks[rank].node} {where}")
    rest = next((frames for rank, frames in stacks.items() if rank not in odd and frames), ())
    others = f"; the others wait in {rest[0].function}" if rest else ""
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    return "; ".join(parts) + more + others


def collect(run: Path, into: Path) -> str:
    """Move the stack files of the newest attempt into a folder and describe them."""
    into.mkdir(parents=True, exist_ok=True)
    ranks = {one.rank: one for one in run_files.read_ranks(run)}
    stacks: dict[int, tuple[Frame, ...]] = {}
    for rank in ranks:
        path = run_files.stack_file(run, rank)
        text = path.read_text(errors="replace") if path.is_file() else ""
        if path.is_file():
            shutil.copyfile(path, into / path.name)
        stacks[rank] = main_thread(text)
    return describe(stacks, ranks) if ranks else "no rank had come so far as to tell its stack"


def _place(frames: tuple[Frame, ...]) -> tuple[str, str]:
    return frames[0].file, frames[0].function
