"""The cluster that all tests of this folder share; without Slurm they are skipped, and the last lines say which."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from no_cluster import NO_CLUSTER

from data_pipeline.make import make
from launcher import dev_cluster


@pytest.fixture(scope="session")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two virtual nodes and real daemons, for as long as tests run."""
    if reason := dev_cluster.missing():
        pytest.skip(NO_CLUSTER + reason)
    with dev_cluster.started(tmp_path_factory.mktemp("slurm"), nodes=2):
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "set"
    make(folder, samples=96, image_size=24, samples_per_shard=32, workers=1)
    return folder


@pytest.fixture
def project(tmp_path: Path, shards: Path) -> Path:
    """A folder with the shards."""
    (tmp_path / "set").symlink_to(shards)
    return tmp_path
