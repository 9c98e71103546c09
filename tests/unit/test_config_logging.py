"""Log lines reach the console of the main rank and a file of every rank."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmpretrain.core.logging import configure_logging
from mmpretrain.core.ranks import World


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)
            handler.close()
    logging.captureWarnings(False)


def log_lines(world: World, run_dir: Path) -> None:
    configure_logging(world, run_dir)
    logging.getLogger("data_pipeline.loader").info("all is well")
    logging.getLogger("mmpretrain.training").warning("look here")
    logging.getLogger("another.library").info("chatter")


def test_the_main_rank_prints_what_it_also_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_lines(World(), tmp_path)
    printed = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    written = (tmp_path / "logs" / "rank-0.log").read_text()
    assert printed == ["all is well", "look here"]
    assert "INFO data_pipeline.loader: all is well" in written
    assert "chatter" not in written


def test_other_ranks_print_warnings_alone_with_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_lines(World(rank=3, size=4), tmp_path)
    printed = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert printed == ["[rank 3] look here"]
    assert "all is well" in (tmp_path / "logs" / "rank-3.log").read_text()


def test_configuring_twice_prints_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World())
    log_lines(World(), tmp_path)
    assert capsys.readouterr().err.count("all is well") == 1
