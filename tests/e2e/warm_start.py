"""Runs the command line in a fresh process each time, without the seconds that importing torch costs each time.

Enter: one JSON request a line on stdin: {"start": arguments, "logs": folder, "environment": more variables,
"max_file_bytes": n or null}, or {"wait": pid}. Leave: one JSON reply a line: the pid, or the exit code. Each run is a
fork of this process, which has imported everything and computed nothing, so that runs share no state.
"""

import gc
import json
import os
import resource
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

WARM = (
    "mmpretrain.training.run",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which DeepSpeed imports with the first ZeRO engine
    "peft",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
"""Imported by the server alone: processes that a run spawns to decode data import this file too."""


def start(arguments: Sequence[str], logs: str, environment: Mapping[str, str], max_file_bytes: int | None) -> int:
    """Fork a process that runs the command line with its stdout and stderr in files of the folder `logs`."""
    from mmpretrain.cli import main

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _redirect(Path(logs))
        os.environ.update(environment)
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        main(list(arguments))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - printed as an interpreter does that ends by an exception
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(logs: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def serve() -> None:
    """Answer requests until stdin ends."""
    gc.disable()  # imports make a million objects that stay
    for module in WARM:
        import_module(module)
    assert threading.active_count() == 1, "a process with threads cannot be forked safely"
    gc.freeze()  # no run looks through them
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            reply = start(request["start"], request["logs"], request["environment"], request["max_file_bytes"])
        else:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        print(json.dumps(reply), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    serve()
