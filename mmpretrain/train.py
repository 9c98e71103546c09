"""`torchrun -m mmpretrain.train CONFIG [key=value ...]`: the ecosystem's own way to `mmpretrain train`."""

import sys

from mmpretrain.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
