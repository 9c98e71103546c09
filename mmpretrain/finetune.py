"""`torchrun -m mmpretrain.finetune CONFIG --from CHECKPOINT [key=value ...]`: the same as `mmpretrain finetune`."""

import sys

from mmpretrain.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
