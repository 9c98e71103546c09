"""Fixtures every test may use: the folder of real photos and clips, found by an environment variable."""

import gc
import os
from pathlib import Path

import pytest
from no_cluster import NO_CLUSTER


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real media; tests that need it are skipped, saying so, where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MMPRETRAIN_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MMPRETRAIN_TEST_DATA to the folder that holds flickr1k/")
    return folder


gc.disable()  # while tests are collected, which imports all


def pytest_collection_finish() -> None:
    """What was imported lives as long as the process; collections need not look through it."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missed = [report for report in terminalreporter.getreports("skipped") if NO_CLUSTER in str(report.longrepr)]
    if missed:
        terminalreporter.section("NOT RUN: the launcher on a real cluster", red=True)
        terminalreporter.line(str(missed[0].longrepr[2]) if isinstance(missed[0].longrepr, tuple) else NO_CLUSTER)
        for report in missed:
            terminalreporter.line(f"  {report.nodeid}")
