"""`data make`: the synthetic set that a tiny model learns in minutes, and that shows what it did not learn.

Enter: how many training samples, and a seed. Leave: `train/`, `val/` (the same pairs of colour and shape) and
`heldout/` (pairs that training never shows) as folders of indexed shards of pictures, videos, recordings and text;
`classes.json`, `video-classes.json` and `audio-classes.json` for zero-shot evaluation, and `manifest.json`. Refused: a
folder that holds anything else. The same options give the same bytes.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from data_pipeline import clips, shapes, tones
from data_pipeline.parallel import run_parallel
from data_pipeline.scenes import draw_sample
from data_pipeline.shapes import HELD_OUT, PAIRS, SEEN
from data_pipeline.shard_writer import finish_shard, shard_paths, write_unfinished
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import generator, key_of

MANIFEST = "manifest.json"
CLASSES: dict[str, dict[str, object]] = {
    "classes.json": {
        "classes": [" ".join(pair) for pair in PAIRS],
        "templates": shapes.PROMPTS,
        "label_key": "label",
    },
    "video-classes.json": {"classes": clips.CLASSES, "templates": clips.PROMPTS, "label_key": "video_label"},
    "audio-classes.json": {"classes": tones.CLASSES, "templates": tones.PROMPTS, "label_key": "audio_label"},
}
"""What zero-shot evaluation chooses among, by modality."""
PAIRS_OF_SPLIT = {"train": SEEN, "val": SEEN, "heldout": HELD_OUT}


@dataclass(frozen=True)
class SyntheticSet:
    """All that decides the bytes."""

    samples: int
    seed: int = 0
    image_size: int = 64
    """Height and width of the pictures in pixels; videos have half."""
    samples_per_shard: int = 500

    @property
    def split_sizes(self) -> dict[str, int]:
        """A tenth of the training samples each to test on, and never fewer than two of each pair."""
        return {
            "train": self.samples,
            "val": max(self.samples // 10, 2 * len(SEEN)),
            "heldout": max(self.samples // 10, 2 * len(HELD_OUT)),
        }


@dataclass(frozen=True)
class _Shard:
    path: Path
    split: str
    numbers: range


def make(
    out: Path,
    samples: int = 6000,
    seed: int = 0,
    image_size: int = 64,
    samples_per_shard: int = 500,
    workers: int | None = None,
) -> dict[str, int]:
    """Write what is missing of the set; the number of samples of each split."""
    if min(samples, samples_per_shard) < 1 or image_size < 16 or image_size % 4:
        raise ConfigError(
            f"--samples {samples}, --samples-per-shard {samples_per_shard}, --image-size {image_size}: give at least "
            "1 sample, 1 sample per shard and 16 pixels, a multiple of 4"
        )
    asked = SyntheticSet(samples, seed, image_size, samples_per_shard)
    _open_folder(out, asked)
    missing = [shard for shard in _divide(asked, out) if not shard.path.exists()]
    run_parallel(partial(_write, asked), missing, workers, "drawing")
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"made {', '.join(f'{count} {split}' for split, count in asked.split_sizes.items())} samples in {out}",
        markup=False,
    )
    return asked.split_sizes


def _open_folder(out: Path, asked: SyntheticSet) -> None:
    described = asdict(asked)
    if (out / MANIFEST).exists():
        found = json.loads((out / MANIFEST).read_text())
        if found != described:
            raise ConfigError(f"{out} holds a set made with {found}, now asked is {described}; give another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds files that `data make` did not write; give an empty or new folder")
    for split in asked.split_sizes:
        (out / split).mkdir(parents=True)
    for name, classes in CLASSES.items():
        (out / name).write_text(json.dumps(classes, indent=2) + "\n")
    (out / MANIFEST).write_text(json.dumps(described, indent=2) + "\n")


def _divide(asked: SyntheticSet, out: Path) -> list[_Shard]:
    shards = []
    for split, count in asked.split_sizes.items():
        starts = range(0, count, asked.samples_per_shard)
        for path, start in zip(shard_paths(out / split, len(starts)), starts, strict=True):
            shards.append(_Shard(path, split, range(start, min(start + asked.samples_per_shard, count))))
    return shards


def _write(asked: SyntheticSet, shard: _Shard) -> None:
    write_unfinished(shard.path, _samples(asked, shard))
    finish_shard(shard.path)


def _samples(asked: SyntheticSet, shard: _Shard) -> Iterator[dict[str, str | bytes]]:
    """Each sample is drawn from its own key."""
    for number in shard.numbers:
        draw = generator(key_of(asked.seed, "shapes", shard.split, number))
        members = draw_sample(PAIRS_OF_SPLIT[shard.split], number, asked.image_size, draw)
        yield {"__key__": f"{shard.split}-{number:07d}", **members}
