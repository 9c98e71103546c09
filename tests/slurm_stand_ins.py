"""Scripts in the place of Slurm's commands, for tests of what is asked of Slurm; each call is written down.

Enter: a folder, and what a command is to do. Leave: the file of the calls. Without a script squeue shows job 5 running
on n1, srun runs its program, and the others print n1.
"""

from collections.abc import Callable
from pathlib import Path

Commands = Callable[..., Path]
"""Command -> script, as keywords; returns the file of the calls."""

RUNNING = "echo '7|5_2|RUNNING|None|n1|9:00'"
_SRUN = 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=0 SLURMD_NODENAME=n1 exec "$@"'


def put_commands(folder: Path, scripts: dict[str, str]) -> Path:
    """Write them to `folder`/bin."""
    (folder / "bin").mkdir(exist_ok=True)
    scripts = dict.fromkeys(("scontrol", "scancel", "sbatch"), "echo n1") | {"squeue": RUNNING, "srun": _SRUN} | scripts
    for name, script in scripts.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >>{folder}/calls\n{script}\n')
        path.chmod(0o755)
    return folder / "calls"
