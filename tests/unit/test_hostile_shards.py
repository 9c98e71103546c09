"""Tars, indexes and collection files of a stranger: one message, exit code 3, and nothing done outside their folder."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard import only_within
from hostile import (
    DEEP,
    HUGE_NUMBER,
    PICTURE,
    about_next,
    exit_code,
    header,
    pax_record,
    sample,
    told_otherwise,
    write_header,
    write_tar,
)

from data_pipeline.array_file import encode_arrays, map_arrays
from data_pipeline.collection import load_collection
from data_pipeline.index import load_or_build_index
from data_pipeline.index_file import INDEX_MAGIC, index_path
from mmpretrain.core.errors import DataError

TARS = {
    "a sparse file": (sample(about_next(b"x", pax_record("GNU.sparse.major", "1"))), "the member is a sparse file"),
    "a size for all members": (sample(about_next(b"g", pax_record("size", "99999"))), "gives all members one size"),
    "a name for all members": (sample(about_next(b"g", pax_record("path", "b.txt"))), "gives all members one path"),
    "a pax header of a megabyte": (sample(about_next(b"x", pax_record("a", "c" * (1 << 20)))), "more than 1048576"),
    "a long name of megabytes": (sample(about_next(b"L", b"n" * (1 << 20) + b"n")), "more than 1048576"),
    "a size of thousands of digits": (sample(about_next(b"x", pax_record("size", HUGE_NUMBER))), "is not a number"),
    "a size in other digits": (sample(about_next(b"x", pax_record("size", "²³"))), "size '²³' is not a number"),
    "a negative size": (sample(size=b"\xff" * 12), "it was cut off"),
    "a size of all sevens": (sample(size=b"77777777777\0"), "should hold 8589934591 bytes"),
    "a negative octal size": (sample(size=b"-1000".ljust(12)), "b'-1000' is not octal"),
    "an octal size that Python alone reads": (sample(size=b"0o1_000".ljust(12)), "b'0o1_000' is not octal"),
    "a size that is no number": (sample(size=b"0x7fffffff\0\0"), "is not octal"),
    "an absolute pax name": (sample(about_next(b"x", pax_record("path", "/etc/passwd"))), "has an absolute name"),
    "a pax name that climbs": (sample(about_next(b"x", pax_record("path", "x/../../y.txt"))), "climbs out"),
    "a pickle behind a pax name": (sample(about_next(b"x", pax_record("path", "a.pkl"))), "is a pickle member"),
    "a link with content": (sample(header(b"a.txt", b"00000001000\0", b"2")), "is a symbolic link"),
    "a name with a zero": (sample(about_next(b"L", b"a.txt\0/../../etc/passwd")), "control characters in its name"),
    "a name of two lines": (sample(name=b"a\nerror: all is well\n.txt"), "control characters in its name"),
    "a name that commands the terminal": (sample(name=b"a\x1b]0;owned\x07.txt"), "control characters in its name"),
    "a name of half characters": (sample(name=b"a\xed\xa0\x80.txt"), "is not UTF-8"),
    "a bomb of gzip": (gzip.compress(bytes(1 << 22)), "this is no tar header"),
    "nothing but zeros": (bytes(2 << 20), "the copy of this file never finished"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = TARS[name]
    (tmp_path / "s.tar").write_bytes(content)
    assert_refused(["data", "index", tmp_path, "--workers", 1], message, tmp_path, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.tar"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_never_opened(
    make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "s.tar")
    assert_refused(["data", "index", tmp_path, "--workers", 1], "is not a file", tmp_path, capsys)


def change_array(name: str, place: int, value: int) -> Callable[[Path], None]:
    """Another value in an array of the index, its file otherwise sound."""

    def change(path: Path) -> None:
        loaded = map_arrays(path, INDEX_MAGIC)
        assert loaded is not None
        told, arrays = loaded
        array = arrays[name].astype(np.int64)
        array[place] = value
        told.pop("body_crc32")
        path.write_bytes(encode_arrays(INDEX_MAGIC, told, arrays | {name: array}))

    return change


def change_header(**values: object) -> Callable[[Path], None]:
    return lambda path: told_otherwise(path, lambda told: told.update(values))


def change_layout(number: int, value: object) -> Callable[[Path], None]:
    """Another kind (1), offset (2) or count (3) of the first array."""

    def change(told: dict[str, Any]) -> None:
        told["arrays"][0][number] = value

    return lambda path: told_otherwise(path, change)


def replace_header(text: str) -> Callable[[Path], None]:
    return lambda path: write_header(path, INDEX_MAGIC, text.encode(), b"")


INDEXES = {
    "an offset beyond the tar": change_array("offset", 1, 1 << 40),
    "a negative offset": change_array("offset", 0, -512),
    "a range that overflows": change_array("length", 1, (1 << 63) - 1),
    "a negative length": change_array("length", 0, -1),
    "a member beyond its sample": change_array("member_offset", 0, 4096),
    "a member of negative size": change_array("member_size", 0, -1),
    "a member as large as the tar": change_array("member_size", 0, 4096),
    "members of no sample": change_array("member_end", 1, 2),
    "members that run backwards": change_array("member_end", 0, 5),
    "an extension that is none": change_array("member_extension", 2, 7),
    "a key beyond all keys": change_array("key_end", 1, 1 << 31),
    "a key that commands the terminal": change_array("key_bytes", 0, 0x1B),
    "a key of half a character": change_array("key_bytes", 0, 0xC3),
    "more samples than it holds": change_layout(3, 1 << 40),
    "a negative count": change_layout(3, -1),
    "an array before the file": change_layout(2, -64),
    "an array of objects": change_layout(1, "|O"),
    "an array of tables": change_layout(1, "(9,9)<i8"),
    "an array without a name of a type": change_layout(1, 8),
    "extensions that are numbers": change_header(extensions=[1, 2]),
    "a size that is text": change_header(shard_bytes="4096"),
    "a header that is a list": replace_header("[1]"),
    "a header nested too deep": replace_header(DEEP),
    "a header of a huge number": replace_header(HUGE_NUMBER),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_lies_is_refused_before_it_leads_anywhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.png": PICTURE, "a.txt": b"one", "b.png": PICTURE, "b.txt": b"two"})
    load_or_build_index(shard)
    INDEXES[name](index_path(shard))
    assert_refused(["data", "stats", tmp_path, "--workers", 1], "s.tar.index is damaged; run", tmp_path, capsys)


COLLECTIONS: dict[str, dict[str, object]] = {
    "kinds that are none": {"kinds": [[["png", "yes"]]]},
    "kinds of numbers": {"kinds": [[[1, True]]]},
    "fewer kinds than shards need": {"kinds": []},
    "kinds that are text": {"kinds": "png"},
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_collection_that_lies_is_refused_and_made_anew(name: str, tmp_path: Path) -> None:
    collection = indexed_folder(tmp_path)
    told_otherwise(collection, lambda told: told.update(COLLECTIONS[name]))
    assert_made_anew(collection)


@pytest.mark.parametrize(("column", "value"), [("samples", 1 << 62), ("samples", -1), ("bytes", -1), ("kinds", -1)])
def test_a_collection_of_impossible_numbers_is_refused_and_made_anew(column: str, value: int, tmp_path: Path) -> None:
    collection = indexed_folder(tmp_path)
    loaded = map_arrays(collection, b"MMPCOL01")
    assert loaded is not None
    told, arrays = loaded
    told.pop("body_crc32")
    collection.write_bytes(encode_arrays(b"MMPCOL01", told, arrays | {column: np.array([value], np.int64)}))
    assert_made_anew(collection)


def indexed_folder(folder: Path) -> Path:
    """A folder of one shard; its collection file."""
    write_tar(folder / "s.tar", {"a.png": PICTURE, "a.txt": b"one"})
    assert exit_code("data", "index", folder, "--workers", 1) == 0
    found = load_collection(folder)
    assert found is not None and json.dumps(sorted(found)) == '["s.tar"]'
    return folder / "collection.index"


def assert_made_anew(collection: Path) -> None:
    """It is refused by who reads it; `data index`, which the message names, mends it."""
    with only_within(collection.parent):
        with pytest.raises(DataError, match=r"collection\.index is damaged; run `mmpretrain data index"):
            load_collection(collection.parent)
        assert exit_code("data", "index", collection.parent, "--workers", 1) == 0
        assert load_collection(collection.parent) is not None


def assert_refused(
    arguments: list[object], message: str, folder: Path, capsys: pytest.CaptureFixture[str], code: int = 3
) -> None:
    """One error, and nothing opened outside the folder."""
    capsys.readouterr()
    with only_within(folder):
        assert exit_code(*arguments) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "  "))]
    assert message in "\n".join(errors) and sum(line.startswith("error: ") for line in errors) == 1, errors
