"""The doors by which a stranger's bytes come in, each with valid examples and what is called with a changed one.

Enter: a folder to build examples in. Leave: `Door`s. Each takes (working folder, random generator): it writes a changed
example there and reads it as the product does.
"""

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from hostile import PICTURE, write_tar
from media import m4a, video
from mutations import mutated, mutated_json, resealed_header, resealed_tar
from PIL import Image
from published_model import CODECS, write_tokenizer, write_unverified
from run_reports import write as write_attempt
from safetensors.torch import save_file

from data_pipeline.check import check_shard
from data_pipeline.collection import contents_of, load_collection, save_collection
from data_pipeline.facts import facts_of
from data_pipeline.index import load_or_build_index
from data_pipeline.pack_sources import plan_entries, read_captions
from data_pipeline.reader import SampleReader, open_sources
from data_pipeline.sniff import usable_extension
from mmpretrain.config import RunConfig
from mmpretrain.core.config import load_config
from mmpretrain.core.types import FieldSpec
from mmpretrain.inference.opening import load
from mmpretrain.inference.store import EmbeddedRow, Header, join_parts, read_embeddings, table_of, write_part
from mmpretrain.tracking.report import compose
from mmpretrain.tracking.report_facts import read_story
from mmpretrain.training.manifest import read_weights

ROOT = Path(__file__).resolve().parents[1]
INPUTS = {
    "image": FieldSpec((3, 16, 16), "uint8"),
    "audio": FieldSpec((16_000,), "int16", 16_000),
    "video": FieldSpec((4, 3, 16, 16), "uint8"),
    "text": FieldSpec((12,), "int64"),
    "animal": FieldSpec((), "int64", below=3),
}


@dataclass(frozen=True)
class Door:
    """One way in."""

    name: str
    enter: Callable[[Path, random.Random], object]


def build_doors(examples: Path) -> list[Door]:
    """All of them; `examples` holds what stays valid."""
    return [
        Door("tar", tars(examples / "tars")),
        Door("index", indexes(examples / "indexes")),
        Door("collection", collections(examples / "collections")),
        *media(examples / "media"),
        Door("table", tables()),
        Door("config", configs()),
        Door("checkpoint", checkpoints(examples / "checkpoint")),
        Door("published", published(examples / "published")),
        Door("run", runs(examples / "run")),
        Door("embeddings", embeddings(examples / "embeddings")),
    ]


def tars(folder: Path) -> Callable[[Path, random.Random], object]:
    long_name = f"{'deep/' * 30}b.json"
    example = write_tar(folder / "s.tar", {"a.png": PICTURE, "a.txt": b"one", long_name: b'{"captions": ["two"]}'})
    content = example.read_bytes()

    def enter(work: Path, chance: random.Random) -> None:
        changed = mutated(content, chance)
        (work / "s.tar").write_bytes(resealed_tar(changed) if chance.random() < 0.8 else changed)
        check_shard(work / "s.tar")
        load_or_build_index(work / "s.tar")

    return enter


def indexes(folder: Path) -> Callable[[Path, random.Random], object]:
    example = write_tar(folder / "s.tar", {"a.png": PICTURE, "a.txt": b"one", "b.png": PICTURE, "b.txt": b"two"})
    load_or_build_index(example)
    content = (folder / "s.tar.index").read_bytes()

    def enter(work: Path, chance: random.Random) -> None:
        shutil.copy2(example, work / "s.tar")
        changed = mutated(content, chance)
        (work / "s.tar.index").write_bytes(resealed_header(changed) if chance.random() < 0.8 else changed)
        (source,) = open_sources({"main": [str(work)]})
        reader = SampleReader([source])
        for number in range(source.num_samples):
            place = reader.find(0, number)
            print(place.full_key.isprintable(), len(place.read().members), file=io.StringIO())

    return enter


def collections(folder: Path) -> Callable[[Path, random.Random], object]:
    example = write_tar(folder / "s.tar", {"a.png": PICTURE, "a.txt": b"one"})
    save_collection(folder, {"s.tar": contents_of(load_or_build_index(example))})
    content = (folder / "collection.index").read_bytes()

    def enter(work: Path, chance: random.Random) -> None:
        changed = mutated(content, chance)
        (work / "collection.index").write_bytes(resealed_header(changed) if chance.random() < 0.8 else changed)
        load_collection(work)

    return enter


def media(folder: Path) -> Iterator[Door]:
    tokenizer = str(write_tokenizer(folder / "tokenizer"))
    for kind, seeds in {"image": pictures(), "audio": sounds(), "video": clips(), "text": texts()}.items():
        codec = CODECS[kind].codec(INPUTS, tokenizer)
        label = CODECS["animal"].codec(INPUTS, None)

        def enter(
            work: Path,
            chance: random.Random,
            seeds: Mapping[str, bytes] = seeds,
            decode: Callable[..., object] = codec.decode,
            label: Callable[..., object] = label.decode,
        ) -> None:
            name = chance.choice(list(seeds))
            content = mutated(seeds[name], chance)
            (work / "member").write_bytes(content)
            extension = name.partition(" ")[0]
            facts_of({extension: content})
            for read in (lambda: usable_extension(content), lambda: label({extension: content}, None)):
                unless_refused(read)
            decode({extension: content}, None)

        yield Door(kind, enter)


def unless_refused(read: Callable[[], object]) -> None:
    from mmpretrain.core.errors import SampleError

    try:
        read()
    except SampleError:
        return


def pictures() -> dict[str, bytes]:
    chance = np.random.default_rng(0)
    image = Image.fromarray(chance.integers(0, 255, (24, 40, 3), np.uint8))
    grey = Image.fromarray(chance.integers(0, 65535, (9, 9), np.uint16))
    return {
        "jpg": saved(image, "JPEG"),
        "jpg progressive": saved(image, "JPEG", progressive=True),
        "jpg cmyk": saved(image.convert("CMYK"), "JPEG"),
        "jpg exif": saved(
            image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        ),
        "png": saved(image, "PNG"),
        "png palette": saved(image.convert("P"), "PNG"),
        "png sixteen": saved(grey, "PNG"),
        "webp": saved(image, "WEBP"),
        "webp animated": saved(image, "WEBP", save_all=True, append_images=[image.rotate(9)] * 3),
        "gif": saved(image.convert("P"), "GIF", save_all=True, append_images=[image.rotate(9).convert("P")] * 3),
        "bmp": saved(image, "BMP"),
        "tiff": saved(image, "TIFF"),
        "tiff lzw": saved(image, "TIFF", compression="tiff_lzw"),
        "ppm": saved(image, "PPM"),
    }


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sounds() -> dict[str, bytes]:
    wave = np.sin(np.arange(8000) / 9).astype(np.float32)
    found = {"m4a": m4a(wave)}
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, 16_000, format=kind)
        found[kind.lower()] = buffer.getvalue()
    return found


def clips() -> dict[str, bytes]:
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    wave = np.sin(np.arange(5000) / 9).astype(np.float32)
    return {
        "mp4": video(frames, sound=wave),
        "mov": video(frames, kind="mov"),
        "mkv": video(frames, kind="matroska"),
        "webm": video(frames, kind="webm", codec="libvpx-vp9"),
        "avi": video(frames, kind="avi", codec="mpeg4"),
    }


def texts() -> dict[str, bytes]:
    return {
        "txt": "größe and other words".encode(),
        "json": b'{"captions": ["one", "two \\u00e9"], "label": 2, "caption": "three"}',
        "json one": b'{"caption": "a dog", "label": [1, 0.5, null]}',
        "cls": b"2",
    }


def tables() -> Callable[[Path, random.Random], object]:
    examples = {
        "csv": b'image,caption\na.png,"one, two"\nb.png,three\n',
        "tsv": b"image\tcaption\na.png\tone\n",
        "jsonl": b'{"image": "a.png", "caption": "one"}\n{"image": "b/c.png", "caption": ["two", "three"]}\n',
        "parquet": parquet(),
    }

    def enter(work: Path, chance: random.Random) -> None:
        kind = chance.choice(list(examples))
        (work / f"captions.{kind}").write_bytes(mutated(examples[kind], chance))
        (work / "media").mkdir()
        (work / "media" / "a.png").write_bytes(PICTURE)
        plan_entries(work / "media", read_captions(work / f"captions.{kind}", None, None))

    return enter


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png", "b.png"], "caption": ["one", "two"]}), buffer)
    return buffer.getvalue()


def configs() -> Callable[[Path, random.Random], object]:
    text = (ROOT / "configs" / "demo.yaml").read_bytes()
    folders = [ROOT / "configs"]
    whole = load_config(RunConfig, ROOT / "configs" / "demo.yaml", (), folders).model_dump(mode="json")

    def enter(work: Path, chance: random.Random) -> None:
        if chance.random() < 0.5:
            content = mutated(text, chance)
        else:
            content = yaml.safe_dump(mutated_json(whole, chance), allow_unicode=False).encode()
        (work / "run.yaml").write_bytes(content)
        load_config(RunConfig, work / "run.yaml", (), folders)

    return enter


def checkpoints(folder: Path) -> Callable[[Path, random.Random], object]:
    folder.mkdir(parents=True)
    weights = folder / "rank-00000.safetensors"
    save_file({"master/w/0": torch.arange(4.0), "master/w/4": torch.arange(2.0), "replica/b/0": torch.ones(1)}, weights)
    manifest = {
        "position": {"step": 3, "samples": 24, "data_hash": "x", "wandb_id": None, "passed_over": []},
        "zero_stage": 1,
        "world_size": 1,
        "optimizer_step": 3,
        "format": 1,
        "shapes": {"w": [2, 3], "b": []},
        "pieces": {
            "w": {"master": [[0, 4, weights.name], [4, 2, weights.name]]},
            "b": {"replica": [[0, 1, weights.name]]},
        },
        "files": {},
    }
    content = weights.read_bytes()

    def enter(work: Path, chance: random.Random) -> None:
        changed = mutated(content, chance) if chance.random() < 0.5 else content
        (work / weights.name).write_bytes(changed)
        files = {weights.name: [len(changed), hashlib.sha256(changed).hexdigest()]}
        told = manifest | {"files": files}
        (work / "manifest.json").write_text(json.dumps(told if changed != content else mutated_json(told, chance)))
        read_weights(work)

    return enter


def published(folder: Path) -> Callable[[Path, random.Random], object]:
    folder.mkdir(parents=True)
    example = write_unverified(folder, "image", "text")
    names = ("config.json", "processor.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

    def enter(work: Path, chance: random.Random) -> None:
        shutil.copytree(example, work / "model")
        path = work / "model" / chance.choice(names)
        if path.suffix == ".json" and chance.random() < 0.7:
            path.write_text(json.dumps(mutated_json(json.loads(path.read_text()), chance)))
        else:
            path.write_bytes(mutated(path.read_bytes(), chance))
        load(work / "model", "cpu")

    return enter


def runs(folder: Path) -> Callable[[Path, random.Random], object]:
    folder.mkdir(parents=True)
    write_attempt(folder, 0, range(1, 6), 1.0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows += [{**rows[-1], "val/i2t_r@1": 0.5, "val/i2t_chance_r@1": 0.1}]
    del rows[-1]["train/loss"]
    outcome = {"state": "fatal", "step": 5, "message": "x", "reason": "", "time": 1.7e9}
    shown = [{"query": "a", "key": "b", "images": ["c.jpg"], "scores": [0.5], "correct": 0}]
    attempts = [{"attempt": 0, "time": 1.7e9, "ranks": 2, "device": "cpu"}]
    files: dict[str, list[Any]] = {
        "metrics.jsonl": rows,
        "outcome.json": [outcome],
        "attempts.jsonl": attempts,
        "ledger.jsonl": [{"reason": "broken", "position": 1}],
        "evaluation/retrieval-samples.json": [shown],
        "evaluation/pictures.json": [{"val/x": [{"file": "a.png", "caption": "b"}]}],
        "config.yaml": [{"steps": 9, "zero_stage": 1, "tracking": {"trackers": []}}],
    }

    def enter(work: Path, chance: random.Random) -> None:
        (work / "evaluation").mkdir()
        chosen = chance.choice(list(files))
        for name, lines in files.items():
            changed = [mutated_json(line, chance) for line in lines] if name == chosen else lines
            content = "".join(json.dumps(line) + "\n" for line in changed).encode()
            (work / name).write_bytes(mutated(content, chance) if name == chosen and chance.random() < 0.3 else content)
        compose(read_story(work))

    return enter


def embeddings(folder: Path) -> Callable[[Path, random.Random], object]:
    folder.mkdir(parents=True)
    rows = [EmbeddedRow("a", "a.png", 0, "image", None), EmbeddedRow("b", "t.csv", 1, "text", "b")]
    write_part(folder / "part", table_of(rows, np.eye(2, 4, dtype=np.float32)), {})
    header = Header("x", "model", 4, "input")
    join_parts([folder / "part"], folder / "e.parquet", "parquet", header)
    join_parts([folder / "part"], folder / "e", "npy", header)
    files = ("vectors.npy", "rows.jsonl", "embeddings.json")

    def enter(work: Path, chance: random.Random) -> None:
        if chance.random() < 0.5:
            (work / "e.parquet").write_bytes(mutated((folder / "e.parquet").read_bytes(), chance))
            read_embeddings(work / "e.parquet")
            return
        shutil.copytree(folder / "e", work / "e")
        path = work / "e" / chance.choice(files)
        path.write_bytes(mutated(path.read_bytes(), chance))
        read_embeddings(work / "e")

    return enter
