"""Images per CPU-second of the data loader, ours beside its public peers: same photos, tokens, crops and batches.

Enter: a folder of photos. Leaves: a table and benchmarks/results/loader.json. Exits 1 where a ratio is too low.

All sides decode, take a RandomResizedCrop(224, scale 0.9 to 1, bicubic), tokenize to 77 CLIP tokens and batch 64, in
one worker and in two. CPU seconds are those of the process and its workers over as many batches, after a warm-up; the
sides take turns, each round in processes of its own, and a figure is the median of the rounds' ratios. open_clip's
batches are normalised float32, which it has no flag against; all others are uint8, which a model normalises on the
device: "ours, normalised" also does that here, on the CPU.

    python benchmarks/loader.py [--photos FOLDER] [--rounds N]
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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from loader_sides import BATCH, SIDES, SIZE

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PEER_PACKAGES = BUILD / "benchmark-peer"
REQUIREMENTS = ROOT / "benchmarks" / "requirements.txt"
RECORD = ROOT / "benchmarks" / "results" / "loader.json"

SHARD_SAMPLES = 256
SIDE = 480
"""Photos whose longer side is shorter are left out."""
MOSAIC, TILES = (1600, 1200), (3, 3)
PEER_PACKAGE_NAMES = ("webdataset", "megatron-energon", "litdata", "mosaicml-streaming")


@dataclass(frozen=True)
class Photos:
    """Photos of one size, and how much of them is read."""

    contents: Callable[[list[Path]], list[bytes]]
    shards: int
    warm_up: int
    measured: int
    target: float
    """The least ratio to open_clip; every other peer must only be slower than ours."""


def _as_they_are(photos: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in photos]


def _mosaics(photos: list[Path]) -> list[bytes]:
    """As many details to the pixel as a camera's photo has: tiles that are photos of a third of the size."""
    from PIL import Image

    columns, rows = TILES
    found = []
    for first in range(0, len(photos) - columns * rows, 2):
        whole = Image.new("RGB", MOSAIC)
        for number, path in enumerate(photos[first : first + columns * rows]):
            corner = number % columns * MOSAIC[0] // columns, number // columns * MOSAIC[1] // rows
            whole.paste(_tile(Image.open(path)), corner)
        buffer = BytesIO()
        whole.save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def _tile(photo: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.fit(photo.convert("RGB"), (MOSAIC[0] // TILES[0] + 1, MOSAIC[1] // TILES[1]))


PHOTOS = {
    "500 px": Photos(_as_they_are, shards=12, warm_up=4, measured=32, target=2.5),
    "1600x1200": Photos(_mosaics, shards=6, warm_up=3, measured=12, target=4.0),
}


def write_tars(photos: Photos, sources: list[Path], folder: Path) -> dict[str, float]:
    """Returns what the photos are like."""
    import webdataset

    contents = photos.contents(sources)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    samples = cycle(contents)
    for shard in range(photos.shards):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as writer:
            for number, content in enumerate(islice(samples, SHARD_SAMPLES)):
                caption = f"A photo of two dogs that run through shallow water, number {number} ."
                writer.write({"__key__": f"{shard:03}{number:05}", "jpg": content, "txt": caption})
    return {"photos": len(contents), "mean_kb": round(sum(map(len, contents)) / len(contents) / 1000, 1)}


def find_photos(folder: Path) -> list[Path]:
    from PIL import Image

    found = [path for path in sorted(folder.glob("*.jpg")) if max(Image.open(path).size) >= SIDE]
    if not found:
        raise SystemExit(f"error: {folder} holds no .jpg of {SIDE} pixels or more; name a folder with --photos")
    return found


def measure(side: str, source: Path, tokenizer: Path, workers: int, warm_up: int, measured: int) -> float:
    """Images per CPU-second of this process and its workers, which stay busy until after the last batch."""
    import psutil
    import torch

    torch.set_num_threads(1)
    process = psutil.Process()

    def cpu_s() -> float:
        return sum(sum(part.cpu_times()[:2]) for part in (process, *process.children(recursive=True)))

    batches = SIDES[side].batches(source, tokenizer, workers)
    for _ in range(warm_up):
        next(batches)
    begin = cpu_s()
    for _ in range(measured):
        assert tuple(next(batches).shape) == (BATCH, 3, SIZE, SIZE)
    return measured * BATCH / (cpu_s() - begin)


def run_apart(side: str, *arguments: object) -> str:
    """This script in a process of its own, with the packages that the side needs; returns its last word."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if SIDES[side].peer_packages:
        environment["PYTHONPATH"] = str(PEER_PACKAGES)
    command = [sys.executable, __file__, "--apart", side, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {side} failed with {done.returncode}: {' '.join(command)}")
    return done.stdout.split()[-1] if done.stdout else ""


def prepare(side: str, tars: Path) -> Path:
    """What the side reads."""
    if SIDES[side].prepare is None:
        return tars
    folder = tars.with_name(f"{tars.name}-{side.split()[0].lower()}")
    shutil.rmtree(folder, ignore_errors=True)
    run_apart(side, "prepare", tars, folder)
    return folder


def compare(photos: Photos, tars: Path, tokenizer: Path, rounds: int) -> dict[str, dict[str, dict[str, object]]]:
    """Rounds of all sides, in turns from either end; by workers and side."""
    sources = {side: prepare(side, tars) for side in SIDES}
    rates: dict[int, dict[str, list[float]]] = {workers: {side: [] for side in SIDES} for workers in (1, 2)}
    for number in range(rounds):
        for workers, of_side in rates.items():
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                arguments = sources[side], tokenizer, workers, photos.warm_up, photos.measured
                of_side[side].append(float(run_apart(side, "measure", *arguments)))
    return {f"{workers} workers": _figures(of_side) for workers, of_side in rates.items()}


def _figures(rates: dict[str, list[float]]) -> dict[str, dict[str, object]]:
    """Ours as a multiple of each side, and each side's rates."""
    ratios = {side: [mine / rate for mine, rate in zip(rates["ours"], rates[side], strict=True)] for side in SIDES}
    return {
        side: {
            "images_per_cpu_s": round(statistics.median(rates[side]), 1),
            "ours_is_faster": round(statistics.median(ratios[side]), 2),
            "lowest": round(min(ratios[side]), 2),
            "rounds": [round(rate, 1) for rate in rates[side]],
        }
        for side in SIDES
    }


def fetch_peer_packages() -> None:
    if not all(list(PEER_PACKAGES.glob(f"{name.replace('-', '_')}-*")) for name in PEER_PACKAGE_NAMES):
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(PEER_PACKAGES), "-r", str(REQUIREMENTS)], check=True)


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--apart", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.apart:
        _apart(*asked.apart)
        return 0
    fetch_peer_packages()
    tokenizer = BUILD / "benchmark-clip-tokenizer"
    save_clip_tokenizer(tokenizer)
    sources = find_photos(asked.photos)
    results: dict[str, dict[str, object]] = {}
    enough = True
    for name, photos in PHOTOS.items():
        tars = BUILD / f"benchmark-tars-{name.replace(' ', '-')}"
        facts = write_tars(photos, sources, tars)
        figures = compare(photos, tars, tokenizer, asked.rounds)
        results[name] = {"target": photos.target, **facts, **figures}
        print("\n".join(_table(name, facts, figures)), flush=True)
        enough &= all(_enough(of_side, photos.target) for of_side in figures.values())
    asked.record.parent.mkdir(exist_ok=True)
    asked.record.write_text(json.dumps(_machine() | {"results": results}, indent=1) + "\n")
    return 0 if enough else 1


def _apart(side: str, task: str, source: str, target: str, *numbers: str) -> None:
    if task == "prepare":
        write = SIDES[side].prepare
        assert write is not None
        write(Path(source), Path(target))
    else:
        print(measure(side, Path(source), Path(target), *map(int, numbers)), flush=True)


def _enough(figures: dict[str, dict[str, object]], target: float) -> bool:
    peers = {side: figures[side]["ours_is_faster"] for side in SIDES if not side.startswith("ours")}
    return all(float(str(ratio)) >= (target if side == "open_clip" else 1) for side, ratio in peers.items())


def _table(name: str, facts: dict[str, float], figures: dict[str, dict[str, dict[str, object]]]) -> list[str]:
    columns = [f"images/CPU-s, {workers} | ours is faster (lowest round)" for workers in figures]
    lines = [
        f"{name}: {facts['photos']} photos, {facts['mean_kb']} KB",
        f"| side | {' | '.join(columns)} |",
        "| --- |" + " --- |" * 2 * len(columns),
    ]
    for side in SIDES:
        cells = [
            f"{of_side[side]['images_per_cpu_s']} | {of_side[side]['ours_is_faster']} ({of_side[side]['lowest']})"
            for of_side in figures.values()
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return lines


def _machine() -> dict[str, object]:
    packages = ("torch", "torchvision", "open_clip_torch", "webdataset", "pillow", "simplejpeg")
    pins = [line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    peers = {name: number for name, number in pins if name in PEER_PACKAGE_NAMES and name != "webdataset"}
    return {
        "command": "python benchmarks/loader.py",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in packages} | peers | {"webdataset (open_clip, Energon)": "0.2.86"},
    }


if __name__ == "__main__":
    sys.exit(main())
