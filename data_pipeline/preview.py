"""`data preview`: a contact sheet, some images of the shards with their captions, as one PNG.

Enter: folders, globs or tars. Leave: a PNG. Refused: shards without images. A sample that cannot be decoded is drawn as
a grey tile that says why.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from data_pipeline.index import ShardIndex, load_or_build_index
from data_pipeline.reader import read_members
from data_pipeline.shards import resolve_shards
from mmpretrain.core.captions import captions_of
from mmpretrain.core.contact_sheet import TILE, Tile, draw_sheet, fitted, text_tile
from mmpretrain.core.errors import ConfigError, DataError, SampleError
from mmpretrain.core.image_bytes import opened_image
from mmpretrain.core.media_types import IMAGE_EXTENSIONS


def preview(patterns: Iterable[str], out: Path, samples: int = 20, columns: int = 5) -> Path:
    """Draw `samples` images spread evenly over all shards."""
    if samples < 1 or columns < 1:
        raise ConfigError(f"--samples {samples} and --columns {columns} must be at least 1")
    shards = resolve_shards(patterns)
    tiles = list(_tiles([load_or_build_index(shard) for shard in shards], samples))
    if not tiles:
        raise DataError(f"no sample of the {len(shards)} shards holds an image; a contact sheet needs some")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(tiles, min(columns, len(tiles))).save(out, "PNG")
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{len(tiles)} samples drawn in {out}", markup=False)
    return out


def _tiles(indexes: list[ShardIndex], samples: int) -> Iterator[Tile]:
    chosen = [(index, int(n)) for index in indexes for n in np.flatnonzero(index.holds(IMAGE_EXTENSIONS))]
    picks = np.linspace(0, len(chosen) - 1, min(samples, len(chosen))).round().astype(int)
    for pick in picks.tolist():
        index, ordinal = chosen[pick]
        members = read_members(index, ordinal)
        heading = f"{index.shard.name} {index.key(ordinal)}"
        try:
            captions = captions_of(members)
        except SampleError as error:
            captions = [str(error)]
        yield Tile(_thumbnail(members), heading, captions or ["(no caption)"])


def _thumbnail(members: dict[str, bytes]) -> Image.Image:
    content = next(content for extension, content in members.items() if extension in IMAGE_EXTENSIONS)
    try:
        with opened_image(content) as image:
            image.draft("RGB", (TILE, TILE))
            return fitted(image)
    except SampleError as error:
        return text_tile(str(error))
