"""A contact sheet: pictures in rows, each with a heading and lines of text beneath it.

Enter: tiles. Leave: one picture. Refused: nothing; what does not fit beneath a picture is cut and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = 240
"""Width and height, in pixels, of the place of an image."""
MARGIN = 14
LINES = 11
"""Lines of text beneath an image."""
FONT_PIXELS = 13
LINE_PIXELS = 17
_INK, _FAINT, _PAPER, _GREY = (25, 25, 25), (120, 120, 120), (255, 255, 255), (225, 225, 225)


@dataclass(frozen=True)
class Tile:
    """One place of the sheet."""

    image: Image.Image
    """No larger than TILE in either direction."""
    heading: str
    lines: Sequence[str]
    """Texts beneath the heading, each begun by a dash and wrapped."""


def fitted(image: Image.Image) -> Image.Image:
    """The whole image as large as a tile allows."""
    return ImageOps.contain(image.convert("RGB"), (TILE, TILE))


def text_tile(text: str) -> Image.Image:
    """A grey tile with some text, for what has no picture."""
    tile = Image.new("RGB", (TILE, TILE), _GREY)
    lines = _wrap(text, _font(), TILE - 2 * MARGIN, LINES)
    ImageDraw.Draw(tile).multiline_text((MARGIN, MARGIN), "\n".join(lines), _INK, _font(), spacing=4)
    return tile


def draw_sheet(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """All tiles, row by row."""
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


def _text_lines(tile: Tile, font: ImageFont.FreeTypeFont) -> list[str]:
    """The heading on one line, then the texts that fit, each begun by a dash, and how many did not fit."""
    lines = _wrap(tile.heading, font, TILE, 1)
    for number, text in enumerate(tile.lines):
        room = 1 + LINES - len(lines)
        wrapped = _wrap(f"- {text}", font, TILE, LINES)
        is_last = number + 1 >= len(tile.lines)
        if number and len(wrapped) > room - (not is_last):
            return [*lines, f"(and {len(tile.lines) - number} more)"]
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
