"""A program that is done at once: its outcome says which folder it was started for."""

import os
from pathlib import Path

from mmpretrain.core.run_files import OUTCOME, Outcome, write_record

# the first folder of PYTHONPATH is the snapshot of the code inside the run folder
run = Path(os.environ["PYTHONPATH"].split(":")[0]).parents[1]
write_record(run / OUTCOME, Outcome("completed", 1, run.name, "", 0.0))
