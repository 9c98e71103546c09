"""Images per CPU-second of the data loader, ours beside open_clip's own pipeline: same tars, tokens, crops, batches.

Enter: a folder of photos. Leaves: a table and benchmarks/results/loader.json. Exits 1 where the ratio is too low.

Both sides decode, take a RandomResizedCrop(224, scale 0.9 to 1, bicubic), tokenize to 77 CLIP tokens and batch 64 in
one worker. CPU seconds are those of the process and its worker over as many batches, after a warm-up; the sides take
turns, each round in processes of its own, and the figure is the median of the rounds' ratios. open_clip's batches are
normalised float32; ours are uint8, which the model normalises on the device: "ours, normalised" also does that here, on
the CPU. open_clip runs on the webdataset it supports (benchmarks/requirements.txt), fetched on first use.

    python benchmarks/loader.py [--photos FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import version
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PEER_PACKAGES = BUILD / "benchmark-peer"
RECORD = ROOT / "benchmarks" / "results" / "loader.json"

TARGET = 2.3
SIZE, CONTEXT, BATCH = 224, 77, 64
WARM_UP, MEASURED = 4, 32
NUM_SHARDS, SHARD_SAMPLES = 8, 256
SIDE = 480
"""Photos whose longer side is shorter are left out."""


def write_tars(photos: Path, folder: Path, quality: int | None) -> dict[str, float]:
    """Photos of about 500 pixels, cycled over the shards, as they are or encoded again; returns what they are like."""
    import webdataset
    from PIL import Image

    large = [path for path in sorted(photos.glob("*.jpg")) if max(Image.open(path).size) >= SIDE]
    contents = [path.read_bytes() if quality is None else _encode(path, quality) for path in large]
    if not contents:
        raise SystemExit(f"error: {photos} holds no .jpg of {SIDE} pixels or more; name a folder with --photos")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    samples = cycle(contents)
    for shard in range(NUM_SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as writer:
            for number, content in enumerate(islice(samples, SHARD_SAMPLES)):
                caption = f"A photo of two dogs that run through shallow water, number {number} ."
                writer.write({"__key__": f"{shard:03}{number:05}", "jpg": content, "txt": caption})
    return {"photos": len(contents), "mean_kb": round(sum(map(len, contents)) / len(contents) / 1000, 1)}


def _encode(path: Path, quality: int) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def our_batches(tars: Path, tokenizer: Path) -> Iterator[object]:
    from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig
    from data_pipeline.loader import build_loader
    from mmpretrain.core.ranks import BatchPlan, World
    from mmpretrain.core.types import FieldSpec
    from mmpretrain.modalities.image import ImageCodecConfig
    from mmpretrain.modalities.text import TextCodecConfig

    inputs = {"image": FieldSpec((3, SIZE, SIZE), "uint8"), "text": FieldSpec((CONTEXT,), "int64")}
    codecs = {
        "image": ImageCodecConfig(crop_scale=(0.9, 1.0)).codec(inputs, None),
        "text": TextCodecConfig().codec(inputs, str(tokenizer)),
    }
    config = DataConfig(train=MixtureConfig(sources={"photos": SourceConfig(shards=(str(tars),))}), workers=1)
    for (batch,) in build_loader(config, codecs, BatchPlan(BATCH, BATCH, World()), 0, 0, 10**6):
        yield batch.tensors["image"]


def our_normalised_batches(tars: Path, tokenizer: Path) -> Iterator[object]:
    import torch

    from mmpretrain.modalities.image import CLIP_MEAN, CLIP_STD

    mean = 255 * torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = 255 * torch.tensor(CLIP_STD).view(3, 1, 1)
    for pixels in our_batches(tars, tokenizer):
        yield (pixels - mean).div_(std)  # type: ignore[operator]


def peer_batches(tars: Path, tokenizer: Path) -> Iterator[object]:
    import open_clip
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(
        train_data=f"{tars}/{{00000..{NUM_SHARDS - 1:05}}}.tar",
        train_num_samples=10**7,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=1,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(SIZE, is_train=True, mean=None, std=None)
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT)
    for pixels, _ in get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokens).dataloader:
        yield pixels


SIDES: dict[str, Callable[[Path, Path], Iterator[object]]] = {
    "open_clip": peer_batches,
    "ours": our_batches,
    "ours, normalised": our_normalised_batches,
}


def measure(side: str, tars: Path, tokenizer: Path) -> float:
    """Images per CPU-second of this process and its worker, which stay busy until after the last batch."""
    import psutil
    import torch

    torch.set_num_threads(1)
    process = psutil.Process()

    def cpu_s() -> float:
        return sum(sum(part.cpu_times()[:2]) for part in (process, *process.children(recursive=True)))

    batches = SIDES[side](tars, tokenizer)
    for _ in range(WARM_UP):
        next(batches)
    begin = cpu_s()
    for _ in range(MEASURED):
        assert tuple(next(batches).shape) == (BATCH, 3, SIZE, SIZE)  # type: ignore[attr-defined]
    return MEASURED * BATCH / (cpu_s() - begin)


def measure_apart(side: str, tars: Path, tokenizer: Path) -> float:
    """`measure` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if side == "open_clip":
        environment["PYTHONPATH"] = str(PEER_PACKAGES)
    command = [sys.executable, __file__, "--measure", side, str(tars), str(tokenizer)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def compare(tars: Path, tokenizer: Path, rounds: int) -> dict[str, object]:
    """Rounds of all sides, in turns from either end."""
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            rates[side].append(measure_apart(side, tars, tokenizer))
    peer = rates["open_clip"]
    ratios = {side: [rate / base for rate, base in zip(rates[side], peer, strict=True)] for side in SIDES}
    return {
        side: {
            "images_per_cpu_s": round(statistics.median(rates[side]), 1),
            "ratio": round(statistics.median(ratios[side]), 2),
            "lowest_ratio": round(min(ratios[side]), 2),
            "rounds": [round(rate, 1) for rate in rates[side]],
        }
        for side in SIDES
    }


def fetch_peer_packages() -> None:
    if not (PEER_PACKAGES / "webdataset").is_dir():
        wanted = str(ROOT / "benchmarks" / "requirements.txt")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(PEER_PACKAGES), "-r", wanted], check=True)


def save_clip_tokenizer(folder: Path) -> None:
    """open_clip's own vocabulary as a fast tokenizer, checked to give the same tokens."""
    import open_clip
    from transformers import AutoTokenizer, CLIPTokenizer

    theirs = open_clip.get_tokenizer("ViT-B-32")
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    begin, end = "<start_of_text>", "<end_of_text>"
    names = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": end}
    CLIPTokenizer(vocab=theirs.encoder, merges=merges, **names).save_pretrained(folder)
    text = "A photo of two dogs that run through shallow water, number 7 ."
    ours = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ours == theirs(text)[0][: len(ours)].tolist(), "the tokenizers disagree"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "flickr1k" / "images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "TARS", "TOKENIZER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        side, tars, tokenizer = asked.measure
        print(measure(side, Path(tars), Path(tokenizer)), flush=True)
        return 0
    fetch_peer_packages()
    tokenizer = BUILD / "benchmark-clip-tokenizer"
    save_clip_tokenizer(tokenizer)
    results: dict[str, dict[str, object]] = {}
    for name, quality in (("photos as they are", None), ("encoded again at quality 90", 90)):
        tars = BUILD / f"benchmark-tars-{quality or 'original'}"
        facts = write_tars(asked.photos, tars, quality)
        results[name] = {**facts, **compare(tars, tokenizer, asked.rounds)}
        print(_table(name, results[name]), flush=True)
    asked.record.parent.mkdir(exist_ok=True)
    asked.record.write_text(json.dumps(_machine() | {"target": TARGET, "results": results}, indent=1) + "\n")
    return 0 if all(result["ours"]["ratio"] >= TARGET for result in results.values()) else 1  # type: ignore[index]


def _table(name: str, result: dict[str, object]) -> str:
    lines = [f"{name}: {result['photos']} photos, {result['mean_kb']} KB", "| side | images/CPU-s | ratio | lowest |"]
    for side in SIDES:
        figures: dict[str, object] = result[side]  # type: ignore[assignment]
        lines.append(f"| {side} | {figures['images_per_cpu_s']} | {figures['ratio']} | {figures['lowest_ratio']} |")
    return "\n".join(lines)


def _machine() -> dict[str, object]:
    packages = ("torch", "open_clip_torch", "pillow", "simplejpeg")
    return {
        "command": "python benchmarks/loader.py",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in packages} | {"webdataset (open_clip)": "0.2.86"},
    }


if __name__ == "__main__":
    sys.exit(main())
