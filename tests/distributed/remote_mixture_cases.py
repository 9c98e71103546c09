"""One rank that reads a mixture of a local folder, S3 and HTTP, and writes down what it consumed; killed at any time.

Enter: where it stands among its peers, the step to go on from, and a pipe on which each step is granted. Leave: a line
for each step in its file: the digest, the keys and the skips of what was read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from data_pipeline.config import CacheConfig, DataConfig, MixtureConfig, SourceConfig
from data_pipeline.digest import joined
from data_pipeline.loader import Loader, build_loader
from mmpretrain.core.errors import SampleError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import Array, FieldSpec

SIZES = {"local": 120, "s3": 96, "http": 150}
EPOCHS, GLOBAL_BATCH, SEED = 2, 12, 5
STEPS = EPOCHS * sum(SIZES.values()) // GLOBAL_BATCH


@dataclass(frozen=True)
class Number:
    """Reads a .txt; one that holds no number cannot be used."""

    required: bool = True

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {"number": FieldSpec((), "int64"), "number.present": FieldSpec((), "bool")}

    @property
    def extensions(self) -> frozenset[str]:
        return frozenset({"txt"})

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        if not members["txt"].isdigit():
            raise SampleError("no number")
        return {"number": np.array(int(members["txt"])), "number.present": np.array(True)}


def load(shards: Mapping[str, str], cache: Path, world: World, start: int, workers: int = 0) -> Loader:
    sources = {name: SourceConfig(shards=(shards[name],), weight=float(size)) for name, size in SIZES.items()}
    kept = CacheConfig(folder=cache, limit="2MB", ahead=60, downloads=2, attempts=20, timeout_s=20.0)
    config = DataConfig(train=MixtureConfig(sources=sources), workers=workers, cache=kept)
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH // world.size, world)
    return build_loader(config, {"number": Number()}, plan, SEED, start, STEPS)


@dataclass(frozen=True)
class Stores:
    """Where the shards of each set are, and the environment by which their clients find them."""

    shards: Mapping[str, str]
    environment: Mapping[str, str]


def consume(stores: Stores, cache: Path, out: Path, world: World, start: int, workers: int, grants: Connection) -> None:
    """Read step after step, each when it is granted."""
    os.environ.update(stores.environment)
    steps = iter(load(stores.shards, cache, world, start, workers))
    with out.open("w") as file:
        for _ in range(start, STEPS):
            grants.recv()
            batches = next(steps)
            row = {
                "digest": joined(batch.digest for batch in batches),
                "keys": [key for batch in batches for key in batch.keys],
                "skips": [asdict(skip) for batch in batches for skip in batch.skips],
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
