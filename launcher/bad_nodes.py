"""Nodes that failed a preflight, remembered beside the runs so that the next one avoids them too.

Enter: a node and its fault. Leave: `bad-nodes.jsonl` in the folder above the runs; a node is forgotten after a week,
or sooner by deleting its line. Refused: lines that name no node, since names become options of the scheduler.
"""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mmpretrain.core.errors import ClusterError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.run_files import record_of

FILE = "bad-nodes.jsonl"
MEMORY_S = 7 * 86400.0
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class BadNode:
    """One line."""

    node: str
    time: float
    """Seconds since 1970."""
    fault: str = ""


def remember(runs: Path, nodes: Iterable[str], fault: str) -> None:
    """Add nodes."""
    with (runs / FILE).open("a") as file:
        for node in nodes:
            file.write(json.dumps(asdict(BadNode(node, time.time(), fault))) + "\n")


def known(runs: Path) -> list[str]:
    """Nodes that failed within a week, each once."""
    path = runs / FILE
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    rows = [_read(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return sorted({row.node for row in rows if time.time() - row.time < MEMORY_S})


def _read(line: str, place: str) -> BadNode:
    try:
        row = record_of(BadNode, parse_json(line))
    except ValueError as error:
        raise ClusterError(f"{place} is no line of a launcher ({error}); remove it") from error
    if not _NODE.fullmatch(row.node):
        raise ClusterError(f"{place} names the node {row.node[:40]!r}, which is no name of one; remove the line")
    return row
