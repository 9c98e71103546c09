"""Fixtures that several unit tests share."""

from pathlib import Path

import pytest
from published_model import publish


@pytest.fixture(scope="session")
def tiny_published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of all four modalities, published once for all tests."""
    return publish(tmp_path_factory.mktemp("published"))
