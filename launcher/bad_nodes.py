"""Nodes that failed a preflight, remembered beside the runs so that the next one avoids them too.

Enter: a node and its fault. Leave: `bad-nodes.jsonl` in the folder above the runs; a node is forgotten after a week,
or sooner by deleting its line.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

FILE = "bad-nodes.jsonl"
MEMORY_S = 7 * 86400.0


def remember(runs: Path, nodes: Iterable[str], fault: str) -> None:
    """Add nodes."""
    with (runs / FILE).open("a") as file:
        for node in nodes:
            file.write(json.dumps({"node": node, "time": time.time(), "fault": fault}) + "\n")


def known(runs: Path) -> list[str]:
    """Nodes that failed within a week, each once."""
    path = runs / FILE
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return sorted({row["node"] for row in rows if time.time() - row["time"] < MEMORY_S})
