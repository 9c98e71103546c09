"""`python -m mmpretrain.training.uploader CHECKPOINT URL PARENT`: copy a checkpoint to an object store.

Enter: a valid checkpoint. Leave: its copy below the URL, which counts from its manifest on; on stdout one JSON object:
the seconds it took, or the error. Dies with the process that started it. It loads no torch.
"""

import json
import sys
import time
from pathlib import Path

from data_pipeline.stores import Patience, remove, write_file
from mmpretrain.core.errors import MMPretrainError
from mmpretrain.core.run_files import MANIFEST
from mmpretrain.training.file_writer import die_with

ATTEMPTS = 6
ATTEMPT_S = 60.0
LEAST_BYTES_PER_S = 2**20
"""An attempt that is slower is given up."""
ADVICE = "then ask for a checkpoint by control/save, or wait for the next: what is missing is tried again after it"


def upload(checkpoint: Path, url: str) -> None:
    """Copy every file; what an upload before left of the same name counts no more from the start."""
    remove(f"{url}/{MANIFEST}", Patience(ATTEMPTS, ATTEMPT_S, ADVICE))
    for path in sorted(checkpoint.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        timeout_s = ATTEMPT_S + path.stat().st_size / LEAST_BYTES_PER_S
        write_file(path, f"{url}/{path.name}", Patience(ATTEMPTS, timeout_s, ADVICE))


def main(checkpoint: str, url: str, parent: str) -> None:
    die_with(int(parent))
    begun = time.monotonic()
    try:
        upload(Path(checkpoint), url)
        told: dict[str, object] = {"seconds": time.monotonic() - begun}
    except (OSError, MMPretrainError) as fault:
        told = {"error": str(fault)}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
