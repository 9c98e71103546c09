"""Checkpoints and published folders of a stranger: one message, exit code 5, no code run, nothing fetched or read
elsewhere."""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard import only_within
from hostile import DEEP, HUGE_NUMBER, PICTURE, exit_code
from published_model import write_unverified
from safetensors.torch import save_file

from mmpretrain.core.errors import CheckpointError, ConfigError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.inference.opening import load
from mmpretrain.models.parent import open_pretrained
from mmpretrain.training.manifest import read_weights

Json = dict[str, Any]
WEIGHTS = "rank-00000.safetensors"


def write_checkpoint(folder: Path) -> Path:
    """One tensor of six values in two pieces, as `training/checkpoint.py` lays it down."""
    folder.mkdir()
    pieces = {"master/w/0": torch.arange(4.0), "master/w/4": torch.arange(4.0, 6.0)}
    save_file(pieces, folder / WEIGHTS)
    manifest = {
        "position": {"step": 3, "samples": 24, "data_hash": "x", "wandb_id": None, "passed_over": []},
        "zero_stage": 1,
        "world_size": 1,
        "optimizer_step": 3,
        "shapes": {"w": [2, 3]},
        "pieces": {"w": {"master": [[0, 4, WEIGHTS], [4, 2, WEIGHTS]]}},
        "files": {},
        "format": 1,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Sizes and digests of the files as they are, as a stranger would make them right as well."""
    change_manifest(folder, lambda told: told["files"].update(entry_of(folder / WEIGHTS)))


def entry_of(path: Path, name: str = WEIGHTS) -> dict[str, list[object]]:
    return {name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]}


def change_manifest(folder: Path, change: Callable[[Json], object]) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    change(told)
    (folder / "manifest.json").write_text(json.dumps(told))


def put(*path: str, value: object) -> Callable[[Path], None]:
    """Another value in the manifest."""

    def change(told: Json) -> None:
        for key in path[:-1]:
            told = told[key]
        told[path[-1]] = value

    return lambda folder: change_manifest(folder, change)


def pieces(*listed: tuple[int, int, str]) -> Callable[[Path], None]:
    return put("pieces", "w", "master", value=listed)


def name_outside(folder: Path) -> None:
    secret = folder.parent.parent / "secret"
    secret.write_bytes(b"secret")
    change_manifest(folder, lambda told: told["files"].update(entry_of(secret, "../../secret")))


def garbage(content: bytes) -> Callable[[Path], None]:
    """Other weights, sealed again."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)
        seal(folder)

    return write


def other_tensors(folder: Path) -> None:
    save_file({"master/w/0": torch.zeros(2, 2), "master/w/4": torch.zeros(2)}, folder / WEIGHTS)
    seal(folder)


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file elsewhere": (name_outside, "names a file '../../secret'"),
    "a piece elsewhere": (pieces((0, 6, "../../secret")), "do not make up its 6 elements"),
    "pieces over each other": (pieces((0, 4, WEIGHTS), (2, 4, WEIGHTS)), "do not make up its 6 elements"),
    "a negative offset": (pieces((-4, 4, WEIGHTS), (0, 6, WEIGHTS)), "do not make up its 6 elements"),
    "a negative length": (pieces((0, -1, WEIGHTS), (-1, 7, WEIGHTS)), "do not make up its 6 elements"),
    "a length beyond all": (pieces((0, 1 << 62, WEIGHTS)), "do not make up its 6 elements"),
    "a piece of text": (put("pieces", "w", "master", value=[["0", "4", WEIGHTS]]), "do not make up its 6 elements"),
    "a shape beyond all": (put("shapes", "w", value=[1 << 40, 1 << 40]), "do not make up"),
    "a negative shape": (put("shapes", "w", value=[-2, -3]), "the shape of w is"),
    "a shape of text": (put("shapes", "w", value="23"), "the shape of w is"),
    "no such kind": (put("pieces", "w", value={"pickle": [[0, 6, WEIGHTS]]}), "w has none of master, replica"),
    "a step of text": (put("position", "step", value="three"), "step is 'three'"),
    "a step beyond the machine": (put("position", "step", value=1 << 80), "step is"),
    "a manifest too deep": (lambda folder: write(folder / "manifest.json", DEEP), "nested too deep"),
    "a manifest of a huge number": (lambda folder: write(folder / "manifest.json", HUGE_NUMBER), "Exceeds the limit"),
    "tensors of other shapes": (other_tensors, "in another shape than"),
    "tensors under no name": (garbage(b"\x02\0\0\0\0\0\0\0{}"), "its weights cannot be read"),
    "a header as long as the sky": (garbage(struct.pack("<Q", 1 << 63) + b"{}"), "its weights cannot be read"),
    "a pickle for weights": (garbage(pickle.dumps({"w": 1})), "its weights cannot be read"),
}


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    change, message = CHECKPOINTS[name]
    folder = write_checkpoint(tmp_path / "run")
    assert read_weights(folder)["w"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    change(folder)
    with only_within(folder), pytest.raises(CheckpointError, match=message):
        read_weights(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unverified(tmp_path_factory.mktemp("published"), "image", "text")


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


class Evil:
    """What a pickle can do to whoever opens it."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch owned",)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def change_config(change: Callable[[Json], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text())
        change(told)
        write(folder / "config.json", json.dumps(told))

    return rewrite


def set_tower(**values: object) -> Callable[[Path], None]:
    return change_config(lambda told: told["model"]["towers"]["image"].update(values))


def weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    write(folder / "model.safetensors.index.json", json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def fewer_weights(folder: Path) -> None:
    save_file({"towers.image.norm.weight": torch.ones(32)}, folder / "model.safetensors")


def lying_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + content[8:])


def unresolved(told: Json) -> None:
    told["model"]["towers"]["image"] = {"kind": "hf_auto", "name": "somebody/else"}


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights that are a pickle": (only_pickles, "weights of other kinds may run code"),
    "weights in another folder": (weights_elsewhere, "names files that are none of its folder"),
    "an adapter of another model": (lambda f: write(f / "adapter_config.json", "{}"), "leads to another model"),
    "quantization": (change_config(lambda told: told.update(quantization_config={})), "asks for quantization"),
    "a tower to be fetched": (change_config(unresolved), "is still to be read from elsewhere"),
    "a billion layers": (set_tower(depth=10**9), "towers.image.depth is 1000000000, more than any model has"),
    "a width beyond all memory": (set_tower(width=10**8), "and its config describes|describes no model"),
    "a model of other towers": (set_tower(kind="os.system"), "describes no model"),
    "no model": (change_config(lambda told: told.update(model=[1])), "describes no model"),
    "an objective that is none": (change_config(lambda told: told.update(objectives={"x": {}})), "describes no model"),
    "a config too deep": (lambda folder: write(folder / "config.json", DEEP), "config.json is damaged"),
    "a header as long as the sky": (lying_header, "cannot be loaded"),
    "weights that are not there": (fewer_weights, "hold 32 values, and its config describes"),
    "a processor too deep": (lambda folder: write(folder / "processor.json", DEEP), "does not describe codecs"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_published_folder_is_refused(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FOLDERS[name]
    change(folder)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "a.png").write_bytes(PICTURE)
    with only_within(folder.parent):
        assert exit_code("embed", folder, folder.parent / "a.png", "--out", folder.parent / "e.parquet") == 5
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and re.search(message, error), error
    assert not (folder.parent / "owned").exists()


TOKENIZERS = {
    "garbage": "garbage",
    "nothing": "{}",
    "a list": "[]",
    "a model that is none": '{"version": "1.0", "added_tokens": [], "model": {"type": "Evil"}}',
    "too deep": DEEP,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(folder / "tokenizer.json", TOKENIZERS[name])
    (tmp_path / "a.png").write_bytes(PICTURE)
    with only_within(tmp_path):
        assert exit_code("embed", folder, tmp_path / "a.png", "--out", tmp_path / "e.parquet") == 2
    assert f"error: tokenizer '{folder}' cannot be loaded" in capsys.readouterr().err


def test_a_tokenizer_of_two_billion_words_is_refused(folder: Path) -> None:
    told = json.loads((folder / "tokenizer.json").read_text())
    told["model"]["vocab"]["red"] = (1 << 31) - 1
    write(folder / "tokenizer.json", json.dumps(told))
    with pytest.raises(ConfigError, match="gives a word the number 2147483647, beyond 16777216 words"):
        load(folder, "cpu")


def test_code_beside_a_model_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    write(folder / "evil.py", "open('owned', 'w')\nclass Evil: pass\n")
    named = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
    change_config(lambda told: told.update(auto_map=named))(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", json.dumps(told | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with only_within(folder.parent):
        assert load(folder, "cpu").modalities == ("image", "text")
        load_tokenizer(folder, local_only=True)
    assert not (folder.parent / "owned").exists()


def test_a_parent_whose_weights_are_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    write(tmp_path / "config.json", json.dumps(config | {"intermediate_size": 8, "image_size": 8, "patch_size": 8}))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="its weights cannot be read"):
        open_pretrained(str(tmp_path), {})
    assert not (tmp_path / "owned").exists()


def test_what_lies_outside_a_folder_is_not_embedded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    write(tmp_path / "secret.txt", "a secret")
    (inputs / "a.txt").symlink_to(tmp_path / "secret.txt")
    (inputs / "b.png").write_bytes(PICTURE)
    table = write_lines(tmp_path / "texts.jsonl", '{"text": "a dog"}', '{"text": "\\ud800"}')
    out, again = tmp_path / "e.parquet", tmp_path / "t.parquet"
    with only_within(tmp_path):
        assert exit_code("embed", folder, inputs, "--out", out, "--max-bad", 0.5) == 0
        assert exit_code("embed", folder, table, "--out", again, "--max-bad", 0.5) == 0
    error = capsys.readouterr().err
    assert "broken: a.txt: a.txt is a link that leads out of" in error and "it holds half of a character" in error
    assert b"a secret" not in out.read_bytes()


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path
