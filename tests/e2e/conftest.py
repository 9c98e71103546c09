"""A synthetic set of 64 samples in two shards, a model that trains on it in a second, and a project around them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Project, WarmCommand

from data_pipeline.make import make

CONFIG = """\
output: {folder}/output
steps: 6
precision: fp32
global_batch_size: 8
micro_batch_size: 8
checkpoint: {{every: 2}}
model:
  embed_dim: 32
  towers:
    image: {{kind: native, stem: {{kind: patches, image_size: 16, patch_size: 8}}, width: 32, depth: 2, heads: 4}}
    text: {{kind: native, stem: {{kind: embeddings, context_length: 8}}, width: 32, depth: 2, heads: 4}}
objectives:
  itc: {{kind: infonce}}
data:
  train: {{sources: {{main: {{shards: [{folder}/shards]}}}}}}
  tokenizer: {{train_vocab_size: 300}}
  workers: 0
schedule: {{warmup: 0}}
"""


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmCommand]:
    """Stops after the last test."""
    command = WarmCommand()
    yield command
    command.close()


@pytest.fixture(scope="session")
def synthetic_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    make(folder / "set", samples=64, image_size=24, samples_per_shard=32, workers=1)
    return folder / "set" / "train"


@pytest.fixture
def project(tmp_path: Path, warm: WarmCommand, synthetic_shards: Path) -> Project:
    shutil.copytree(synthetic_shards, tmp_path / "shards")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return Project(tmp_path, warm)
