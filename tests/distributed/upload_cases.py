"""A run that copies its checkpoints to an object store; the tests beside it start it on a rank of its own."""

import os
from collections.abc import Mapping, Sequence

from launch import run_module


def train(environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """`environment` says where the store is."""
    os.environ.update(environment)
    run_module("mmpretrain.train", arguments)
