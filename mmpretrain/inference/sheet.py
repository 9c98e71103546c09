"""Search results as a picture: a thumbnail of each hit with its score and name.

Enter: hits. Leave: a PNG. What has no picture is drawn as what it is: a sound as its waveform, a text as text; a file
that has gone since is a tile that says so.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.index import load_or_build_index
from data_pipeline.reader import read_members
from data_pipeline.shards import shard_at
from mmpretrain.core import audio_bytes, image_bytes, video_bytes
from mmpretrain.core.audio_bytes import AudioLimits
from mmpretrain.core.contact_sheet import TILE, Tile, draw_sheet, fitted, text_tile
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.media_types import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, sniff
from mmpretrain.core.video_bytes import VideoLimits
from mmpretrain.inference.media import read_file
from mmpretrain.inference.searching import Hit
from mmpretrain.inference.store import EmbeddedRow

COLUMNS = 5
MAX_PIXELS = 64_000_000
VIDEO_LIMITS = VideoLimits(max_pixels=8_900_000, max_seconds=3600.0, max_frames=250_000)
AUDIO_LIMITS = AudioLimits(max_seconds=3600.0, max_channels=8)
_WAVE, _PAPER = (60, 90, 160), (240, 242, 248)


def write_sheet(hits: Sequence[Hit], query: str | Path, out: Path) -> Path:
    """Draw the query, a text or a file, and the hits, best first, row by row."""
    if isinstance(query, str):
        asked = Tile(text_tile(query), "query", [])
    else:
        asked = Tile(_drawn(_file(query), query.name), "query", [query.name])
    tiles = [asked, *(_tile(number, hit) for number, hit in enumerate(hits, 1))]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(tiles, min(COLUMNS, len(tiles))).save(out, "PNG")
    return out


def _tile(number: int, hit: Hit) -> Tile:
    lines = [hit.row.key] if hit.row.text is None else [hit.row.key, hit.row.text]
    return Tile(_thumbnail(hit.row), f"{number}.  {hit.score:.3f}  {hit.row.modality}", lines)


def _thumbnail(row: EmbeddedRow) -> Image.Image:
    try:
        return _drawn(_members(row), row.text or row.key)
    except (SampleError, DataError) as error:
        return text_tile(f"cannot be shown: {error}")


def _drawn(members: Mapping[str, bytes], otherwise: str) -> Image.Image:
    """The member that can best be shown; a text where there is none."""
    for extensions, draw in _DRAWN:
        found = next((content for extension, content in members.items() if extension in extensions), None)
        if found is not None:
            return draw(found)
    return text_tile(otherwise)


def _members(row: EmbeddedRow) -> Mapping[str, bytes]:
    """The sample again, from its file or shard; a text of a table has no members."""
    shard = shard_at(row.path)
    if not shard.name.endswith(".tar"):
        return _file(Path(row.path)) if row.text is None else {}
    return read_members(load_or_build_index(shard), row.ordinal)


def _file(path: Path) -> Mapping[str, bytes]:
    content = read_file(path)
    extension = sniff(content)
    return {} if extension is None else {extension: content}


def _picture(content: bytes) -> Image.Image:
    return fitted(Image.fromarray(np.ascontiguousarray(image_bytes.read_header(content, MAX_PIXELS).read(shrink=1))))


def _middle_frame(content: bytes) -> Image.Image:
    with video_bytes.open_video(content, VIDEO_LIMITS) as video:
        frames = video.read(video.frames_at(np.array([video.seconds / 2])))
    return fitted(Image.fromarray(frames[0]))


def _waveform(content: bytes) -> Image.Image:
    """The largest and smallest sample under each column of pixels."""
    recording = audio_bytes.read_header(content, AUDIO_LIMITS)
    samples = recording.read(0, recording.num_samples)
    tile = Image.new("RGB", (TILE, TILE // 2), _PAPER)
    draw, middle = ImageDraw.Draw(tile), TILE // 4
    loudest = max(float(np.abs(samples).max(initial=0)), 1e-6)
    for column, part in enumerate(np.array_split(samples, TILE)):
        if len(part):
            high, low = (round(middle * (1 - 0.95 * float(edge) / loudest)) for edge in (part.max(), part.min()))
            draw.line([(column, high), (column, low)], fill=_WAVE)
    return tile


_DRAWN: tuple[tuple[frozenset[str], Callable[[bytes], Image.Image]], ...] = (
    (IMAGE_EXTENSIONS, _picture),
    (VIDEO_EXTENSIONS, _middle_frame),
    (AUDIO_EXTENSIONS, _waveform),
)
