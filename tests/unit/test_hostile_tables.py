"""Tables, folders of media and run files of a stranger: one message and its exit code, and nothing read elsewhere."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from guard import only_within
from hostile import DEEP, HALF_CHARACTER, HUGE_NUMBER, PICTURE, exit_code

CONFIG = "output: run\nsteps: 1\nglobal_batch_size: 2\nmicro_batch_size: 2\n"


def write_table(folder: Path, name: str, content: str) -> Path:
    (folder / "media").mkdir()
    (folder / "media" / "a.png").write_bytes(PICTURE)
    (folder / name).write_text(content, encoding="utf-8", newline="")
    return folder / name


FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    # name: file named in the table, what stands there, reason
    "a link out of the folder": ("b.png", lambda path: path.symlink_to(path.parents[1] / "secret.png"), "a link that"),
    "a folder that is a link": ("x/secret.png", lambda path: path.parent.symlink_to(path.parents[2]), "a link that"),
    "a link to itself": ("b.png", lambda path: path.symlink_to(path), "there is no such file"),
    "a pipe": ("b.png", os.mkfifo, "there is no such file"),
    "a device": ("b.png", lambda path: path.symlink_to("/dev/zero"), "there is no such file"),
    "a name that climbs": ("../secret.png", lambda path: None, "the name leads out of"),
    "an absolute name": ("/etc/passwd", lambda path: None, "the name leads out of"),
    "a name too long for any file": (f"{'n' * 300}.png", lambda path: None, "cannot be looked up: File name too long"),
    "postscript": ("b.png", lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "of no known media type"),
    "three gigabytes of nothing": ("b.png", lambda path: sparse(path, 3 << 30), "more than the 2147479552"),
}


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_dropped_and_listed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, make, reason = FILES[name]
    packing = tmp_path / "packing"
    packing.mkdir()
    (tmp_path / "packing" / "secret.png").write_bytes(PICTURE)
    table = write_table(packing, "captions.csv", f"image,caption\na.png,one\n{file},two\n")
    make(packing / "media" / file)
    arguments = ["data", "pack", packing / "media", "--captions", table, "--out", tmp_path / "out", "--workers", 1]
    with only_within(tmp_path):
        assert exit_code(*arguments) == 3
        assert exit_code(*arguments, "--max-bad", 0.5) == 0
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and f"1 of the 2 files that {table} names cannot be used" in error
    assert reason in (tmp_path / "out" / "pack-report.jsonl").read_text()
    assert (tmp_path / "out" / "00000.tar").read_bytes().count(PICTURE) == 1


TABLES: dict[str, tuple[str, str, str]] = {
    "a caption of half a character": ("c.jsonl", f'{{"image": "a.png", "caption": {HALF_CHARACTER}}}', "row 1, column"),
    "a line nested too deep": ("c.jsonl", f'{{"image": {DEEP}', "line 1 is not JSON: it is nested too deep"),
    "a line of a huge number": ("c.jsonl", f'{{"image": {HUGE_NUMBER}}}', "line 1 is not JSON: Exceeds the limit"),
    "a caption of two million letters": ("c.jsonl", f'{{"image": "a.png", "caption": "{"a" * 2_000_000}"}}', "row 1"),
    "a field beyond all bounds": ("c.csv", f'image,caption\na.png,"{"a" * 200_000}"\n', "is no readable CSV"),
    "a field that never ends": ("c.csv", 'image,caption\na.png,"one\n', "is no readable CSV"),
    "no Parquet": ("c.parquet", "PAR1 and nothing else PAR1", "is no readable Parquet"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, message = TABLES[name]
    assert_not_packed(tmp_path, write_table(tmp_path, file, content), message, capsys)


def test_a_parquet_of_broken_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, "c.parquet", "")
    broken = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png"], "caption": broken}), table)
    assert_not_packed(tmp_path, table, "is no readable Parquet", capsys)


def test_a_link_in_a_further_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, "c.csv", "image,caption\na.png,one\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.wav").symlink_to(table)
    assert_not_packed(tmp_path, table, "is a link that leads out of", capsys, "--join", tmp_path / "more")


@pytest.mark.parametrize("content", ["{", "[]", '{"plan": []}', DEEP])
def test_a_folder_with_another_manifest_is_left_alone(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path, "c.csv", "image,caption\na.png,one\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(content)
    assert_not_packed(tmp_path, table, "is not what `data pack` wrote", capsys, code=2)


def assert_not_packed(
    folder: Path, table: Path, message: str, capsys: pytest.CaptureFixture[str], *options: object, code: int = 3
) -> None:
    arguments = ["data", "pack", folder / "media", "--captions", table, "--out", folder / "out", "--workers", 1]
    with only_within(folder):
        assert exit_code(*arguments, *options) == code
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error
    assert not list((folder / "out").glob("*.tar"))


def laughs(depth: int) -> str:
    """Ten aliases of the line before on each line."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n".join(lines)


CONFIGS = {
    "a billion laughs": (laughs(9), "aliases unfold to more than 100000 values"),
    "an object of Python": ("seed: !!python/object/apply:os.system [touch owned]", "the tag .* is not supported"),
    "a module of Python": ("seed: !!python/module:os", "the tag .* is not supported"),
    "a number of thousands of digits": (f"seed: {HUGE_NUMBER}", "a number of 5000 digits is beyond 64 bits"),
    "a number beyond the machine": ("seed: 100000000000000000000000000000", "a number of 30 digits is beyond 64 bits"),
    "a number beyond all": ("seed: 1e999", "seed"),
    "lists in lists": (f"seed: {'[' * 200}{']' * 200}", "is nested too deep: more than 50 maps and lists"),
    "lists without end": (f"seed: {DEEP}", "is nested too deep"),
    "half a character": ('output: "\\ud800"', "output: holds half of a character"),
    "code from the hub": ("model: {towers: {image: {kind: hf_auto, name: x, trust_remote_code: true}}}", "unknown key"),
    "code of another module": ("objectives: {a: {kind: os.system}}", "saw kind 'os.system'"),
    "a megabyte": (f"# {'a' * (1 << 20)}", "holds more than 1048576 bytes"),
    "an alias to itself": ("seed: &a [*a]", "has no end"),
    "a key of maps": ("{{a: b}: c}", "a key must be one word"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_run_file_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = CONFIGS[name]
    (tmp_path / "run.yaml").write_text(content)
    with only_within(tmp_path):
        assert exit_code("config", "check", tmp_path / "run.yaml") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert all(line.startswith("error: ") for line in error.splitlines()) and len(error) < 20_000
    assert list(tmp_path.iterdir()) == [tmp_path / "run.yaml"]


def test_defaults_that_double_at_every_level_are_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level in range(40):
        (tmp_path / f"l{level}.yaml").write_text(f"defaults: [l{level + 1}, l{level + 1}]\n")
    (tmp_path / "l40.yaml").write_text("nonsense: 1\n")
    assert exit_code("config", "check", tmp_path / "l0.yaml") == 2
    assert f"{tmp_path / 'l40.yaml'}:1: nonsense: unknown key" in capsys.readouterr().err


def test_an_override_of_a_thousand_levels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert exit_code("config", "check", tmp_path / "run.yaml", "a." * 1000 + "b=1") == 2
    assert "saw no `key=value`" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "micro"), [(64, (1 << 31) - 1), ((1 << 61) - 1, 1 << 60)])
def test_sizes_beyond_all_bounds_are_refused_at_once(
    size: int, micro: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("defaults: [demo]\n")
    begin = time.process_time()
    arguments = [f"global_batch_size={size}", f"micro_batch_size={micro}"]
    assert exit_code("config", "check", tmp_path / "run.yaml", *arguments) == 2
    assert f"is not a multiple of micro_batch_size {micro}" in capsys.readouterr().err
    assert time.process_time() - begin < 5
