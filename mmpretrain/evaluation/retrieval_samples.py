"""A few captions with the images or videos a model finds for them, to look at.

Enter: what each rank encoded. Leave: `evaluation/retrieval-samples.json`, a list of {"query", "key", "images" (paths
relative to that file, best first), "correct" (index into images or null), "scores"}, and thumbnails beside it; of each
caption a strip of its pictures, for trackers.
"""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmpretrain.core.collectives import gather_objects, rank
from mmpretrain.core.types import Picture
from mmpretrain.evaluation.lockstep import first_index, gather_ragged, lengths
from mmpretrain.evaluation.ranking import Embedded, top_rows

THUMBNAIL_SIDE = 112
IMAGES_SHOWN = 5
FRAME = 4
RIGHT = (22, 163, 74)
Record = dict[str, str | list[str] | list[float] | int | None]


@dataclass(frozen=True)
class Found:
    """This rank's rows and captions; `owners[c]` is the row of caption c; one thumbnail (JPEG) a row."""

    keys: list[str]
    captions: list[str]
    owners: list[int]
    thumbnails: list[bytes]


def thumbnail(pixels: Tensor) -> bytes:
    """A small JPEG of uint8 pixels [3, H, W], of frames [T, 3, H, W] the one in the middle."""
    if pixels.ndim == 4:
        pixels = pixels[len(pixels) // 2]
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_samples(run_dir: Path, found: Found, media: Embedded, captions: Embedded, count: int) -> list[Picture]:
    """Write the samples from rank 0, which gets the strips. Communicates."""
    mine = _chosen(len(found.captions), count)
    queries = gather_ragged(captions.vectors[mine])
    asked = [pair for part in gather_objects([_name(found, caption) for caption in mine]) for pair in part]
    first = first_index(len(found.keys))
    rows = torch.arange(first, first + len(found.keys), device=media.ids.device)
    scores, nearest = top_rows(queries, Embedded(media.vectors, rows), IMAGES_SHOWN)
    right = gather_ragged(media.ids)[nearest] == gather_ragged(captions.ids[mine])[:, None]
    wanted = set(nearest.flatten().tolist())
    own = {row: found.thumbnails[row - first] for row in wanted if first <= row < first + len(found.keys)}
    pictures = {row: jpeg for part in gather_objects(own) for row, jpeg in part.items()}
    if rank():
        return []
    records = [
        _record(*pair, rows, hits, score)
        for pair, rows, hits, score in zip(asked, nearest.tolist(), right.tolist(), scores.tolist(), strict=True)
    ]
    _write(run_dir / "evaluation", records, pictures)
    return [
        _strip(run_dir / "evaluation" / "retrieved" / f"{number:02d}.jpg", record, [pictures[row] for row in rows])
        for number, (record, rows) in enumerate(zip(records, nearest.tolist(), strict=True))
    ]


def _chosen(own: int, count: int) -> list[int]:
    """This rank's captions among `count` that are spread evenly over the captions of all ranks. Communicates."""
    total, first = sum(lengths(own)), first_index(own)
    places = {number * total // count for number in range(min(count, total))} if total else set()
    return sorted(place - first for place in places if first <= place < first + own)


def _name(found: Found, caption: int) -> tuple[str, str]:
    return found.captions[caption], found.keys[found.owners[caption]]


def _record(query: str, key: str, rows: list[int], hits: list[bool], scores: list[float]) -> Record:
    return {
        "query": query,
        "key": key,
        "images": [_path(row) for row in rows],
        "correct": hits.index(True) if True in hits else None,
        "scores": [round(score, 4) for score in scores],
    }


def _path(row: int) -> str:
    return f"thumbnails/{row:08d}.jpg"


def _strip(path: Path, record: Record, jpegs: list[bytes]) -> Picture:
    """The pictures of a caption side by side, the right one framed."""
    correct, side = record["correct"], THUMBNAIL_SIDE + 2 * FRAME
    strip = Image.new("RGB", (side * len(jpegs), side), "white")
    for place, jpeg in enumerate(jpegs):
        if place == correct:
            strip.paste(Image.new("RGB", (side, side), RIGHT), (place * side, 0))
        with Image.open(io.BytesIO(jpeg)) as image:
            inset = ((side - image.width) // 2, (side - image.height) // 2)
            strip.paste(image, (place * side + inset[0], inset[1]))
    path.parent.mkdir(exist_ok=True)
    strip.save(path, quality=90)
    found = "not among them" if not isinstance(correct, int) else f"right one at place {correct + 1}"
    return Picture(path, f"{record['query']} ({found})")


def _write(folder: Path, records: list[Record], pictures: dict[int, bytes]) -> None:
    for old in ("thumbnails", "retrieved"):
        shutil.rmtree(folder / old, ignore_errors=True)
    (folder / "thumbnails").mkdir(parents=True)
    for row, jpeg in pictures.items():
        (folder / _path(row)).write_bytes(jpeg)
    partial = folder / "retrieval-samples.json.partial"
    partial.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / "retrieval-samples.json")
