"""`data preview`: a contact sheet, some images of the shards with their captions, as one PNG.

Enter: folders, globs or tars. Leave: a PNG. Refused: shards without images. A sample that cannot be decoded is drawn as
a grey tile that says why.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from rich.console import Console

from data_pipeline.index import ShardIndex, load_or_build_index
from data_pipeline.shards import resolve_shards
from data_pipeline.tar import open_shard
from mmpretrain.core.captions import captions_of
from mmpretrain.core.errors import ConfigError, DataError, SampleError
from mmpretrain.core.media_types import IMAGE_EXTENSIONS

TILE = 240
"""Width and height, in pixels, of the place of an image."""
MARGIN = 14
LINES = 11
"""Lines of captions beneath an image."""
FONT_PIXELS = 13
LINE_PIXELS = 17
_INK, _FAINT, _PAPER, _GREY = (25, 25, 25), (120, 120, 120), (255, 255, 255), (225, 225, 225)


@dataclass(frozen=True)
class _Tile:
    image: Image.Image
    heading: str
    captions: list[str]


def preview(patterns: Iterable[str], out: Path, samples: int = 20, columns: int = 5) -> Path:
    """Draw `samples` images spread evenly over all shards."""
    if samples < 1 or columns < 1:
        raise ConfigError(f"--samples {samples} and --columns {columns} must be at least 1")
    shards = resolve_shards(patterns)
    tiles = list(_tiles([load_or_build_index(shard) for shard in shards], samples))
    if not tiles:
        raise DataError(f"no sample of the {len(shards)} shards holds an image; a contact sheet needs some")
    out.parent.mkdir(parents=True, exist_ok=True)
    _draw_sheet(tiles, min(columns, len(tiles))).save(out, "PNG")
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{len(tiles)} samples drawn in {out}", markup=False)
    return out


def _tiles(indexes: list[ShardIndex], samples: int) -> Iterator[_Tile]:
    chosen = [(index, int(n)) for index in indexes for n in np.flatnonzero(index.holds(IMAGE_EXTENSIONS))]
    picks = np.linspace(0, len(chosen) - 1, min(samples, len(chosen))).round().astype(int)
    for pick in picks.tolist():
        index, ordinal = chosen[pick]
        offset, length = index.sample_range(ordinal)
        with open_shard(index.shard) as data:
            members = index.slice_members(ordinal, data[offset : offset + length])
        heading = f"{index.shard.name} {index.key(ordinal)}"
        try:
            captions = captions_of(members)
        except SampleError as error:
            captions = [str(error)]
        yield _Tile(_thumbnail(members), heading, captions)


def _thumbnail(members: dict[str, bytes]) -> Image.Image:
    content = next(content for extension, content in members.items() if extension in IMAGE_EXTENSIONS)
    try:
        with Image.open(BytesIO(content)) as image:
            image.draft("RGB", (TILE, TILE))
            return ImageOps.contain(image.convert("RGB"), (TILE, TILE))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        tile = Image.new("RGB", (TILE, TILE), _GREY)
        lines = _wrap(f"cannot be decoded: {error}", _font(), TILE - 2 * MARGIN, LINES)
        ImageDraw.Draw(tile).multiline_text((MARGIN, MARGIN), "\n".join(lines), _INK, _font(), spacing=4)
        return tile


def _draw_sheet(tiles: list[_Tile], columns: int) -> Image.Image:
    rows = -(-len(tiles) // columns)
    font = _font()
    texts = [_text_lines(tile, font) for tile in tiles]
    heights = [
        TILE + MARGIN + LINE_PIXELS * max(map(len, texts[row * columns : (row + 1) * columns])) for row in range(rows)
    ]
    size = (MARGIN + columns * (TILE + MARGIN), MARGIN + sum(height + MARGIN for height in heights))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (tile, lines) in enumerate(zip(tiles, texts, strict=True)):
        row, column = divmod(number, columns)
        left = MARGIN + column * (TILE + MARGIN)
        top = MARGIN + sum(height + MARGIN for height in heights[:row])
        inset = ((TILE - tile.image.width) // 2, (TILE - tile.image.height) // 2)
        sheet.paste(tile.image, (left + inset[0], top + inset[1]))
        for line_number, line in enumerate(lines):
            at = (left, top + TILE + MARGIN // 2 + line_number * LINE_PIXELS)
            draw.text(at, line, fill=_FAINT if line_number == 0 else _INK, font=font)
    return sheet


def _text_lines(tile: _Tile, font: ImageFont.FreeTypeFont) -> list[str]:
    """The heading on one line, then the captions that fit, each begun by a dash, and how many did not fit."""
    lines = _wrap(tile.heading, font, TILE, 1)
    for number, caption in enumerate(tile.captions or ["(no caption)"]):
        room = 1 + LINES - len(lines)
        wrapped = _wrap(f"- {caption}", font, TILE, LINES)
        is_last = number + 1 >= len(tile.captions)
        if number and len(wrapped) > room - (not is_last):
            return [*lines, f"(and {len(tile.captions) - number} more)"]
        lines += wrapped
    return lines


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """At most `most` lines of `width` pixels; what does not fit ends in an ellipsis."""
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < most:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if lines and words:
        lines[-1] += "…"
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has most scripts that Pillow's own font lacks."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_PIXELS)
