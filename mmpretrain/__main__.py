"""`python -m mmpretrain` is the command line."""

from mmpretrain.cli import main

main()
