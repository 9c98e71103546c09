"""Where log lines go: the console of the main rank, and a file per rank in the run folder.

Enter: this process's place among its peers and, once it is known, the run folder. Leave: the root logger, set up.
"""

import logging
import sys
from pathlib import Path

from mmpretrain.core.ranks import World

OUR_PACKAGES = ("mmpretrain", "data_pipeline", "launcher")


def configure_logging(world: World, run_dir: Path | None = None) -> None:
    """Send our INFO lines and every WARNING to stderr (other ranks: warnings only) and to `logs/rank-N.log`.

    Calling it again replaces the handlers of the call before.
    """
    root = logging.getLogger()
    for old in root.handlers[:]:
        if old.name in ("mmpretrain-console", "mmpretrain-file"):
            root.removeHandler(old)
            old.close()
    root.addHandler(_console(world))
    if run_dir is not None:
        root.addHandler(_file(world, run_dir))
    for package in OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    logging.captureWarnings(True)


def _console(world: World) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "mmpretrain-console"
    handler.setLevel(logging.INFO if world.is_main else logging.WARNING)
    prefix = f"[rank {world.rank}] " if world.size > 1 else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    return handler


def _file(world: World, run_dir: Path) -> logging.Handler:
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{world.rank}.log", encoding="utf-8")
    handler.name = "mmpretrain-file"
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler
