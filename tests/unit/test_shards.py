"""Which tars a list of patterns names, and what is refused."""

from pathlib import Path

import pytest
from other_user import as_another_user_in

from data_pipeline.shards import resolve_shards
from mmpretrain.core.errors import DataError


def names(patterns: list[str]) -> list[str]:
    return [path.name for path in resolve_shards(patterns)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / f"{number:05d}.tar").touch()
        (tmp_path / f"{number:05d}.tar.index").touch()
    return tmp_path


def test_folders_globs_ranges_and_files_are_sorted_by_name(folder: Path) -> None:
    every = [f"{number:05d}.tar" for number in range(12)]
    assert names([str(folder)]) == every
    assert names([f"{folder}/*.tar"]) == every
    assert names([f"{folder}/{{00008..00011}}.tar"]) == every[8:]
    assert names([f"{folder}/00001.tar", f"{folder}/00000.tar"]) == ["00001.tar", "00000.tar"]
    assert names([f"{folder}/{{0000..0001}}*.tar"]) == every


def test_what_is_missing_is_named_with_the_command_that_makes_it(folder: Path) -> None:
    with pytest.raises(DataError, match=r"shards '.*/nothing': nothing there; .*mmpretrain data pack"):
        names([f"{folder}/nothing"])
    with pytest.raises(DataError, match=r"3 of 5 are missing, the first is .*00012\.tar"):
        names([f"{folder}/{{00010..00014}}.tar"])
    with pytest.raises(DataError, match="no shards are named"):
        names([])
    with pytest.raises(DataError, match="runs backwards"):
        names(["{3..1}.tar"])


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(folder: Path) -> None:
    with pytest.raises(DataError, match=r"shards 'n+': n+ cannot be read: File name too long; correct the path"):
        names(["n" * 300])
    (folder / "closed").mkdir()
    (folder / "closed" / "0.tar").touch()
    (folder / "closed").chmod(0o711)
    with as_another_user_in(folder):
        assert names(["closed/0.tar"]) == ["0.tar"]
        for pattern in ("closed", "closed/*.tar"):
            with pytest.raises(DataError, match=r"closed.*: closed cannot be read: Permission denied; correct"):
                names([pattern])


def test_a_folder_whose_folders_hold_the_shards_says_which(folder: Path) -> None:
    (folder / "root").mkdir()
    (folder / "root" / "train").mkdir()
    (folder / "root" / "train" / "0.tar").touch()
    with pytest.raises(DataError, match="the folder holds no .tar; its folders train hold some: name one of them"):
        names([f"{folder}/root"])
    with pytest.raises(DataError, match="mmpretrain data pack"):
        (folder / "bare").mkdir()
        names([f"{folder}/bare"])


def test_a_shard_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"00003\.tar is named twice; .*`weight`"):
        names([str(folder), f"{folder}/00003.tar"])


@pytest.mark.parametrize("pattern", ["pipe:curl x | cat", "PIPE:rm -rf /"])
def test_shell_commands_are_never_run(pattern: str) -> None:
    with pytest.raises(DataError, match="`pipe:` runs a shell command, and shell commands are never run"):
        names([pattern])
