"""What the newest evaluation of a run left to look at, read back from its folder.

Enter: a run folder. Leave: pictures by name, with their captions; none where no task left any. Refused: a list that
names files outside the folder or is no list of pictures, and pictures that cannot be decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.folders import leads_out
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.run_files import PICTURES
from mmpretrain.core.types import Picture, Pictures

if TYPE_CHECKING:
    from PIL import Image


def read_pictures(run_dir: Path) -> Pictures:
    """As `evaluation/pictures.json` lists them."""
    folder = run_dir / "evaluation"
    path = folder / PICTURES
    try:
        listed = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {
            name: tuple(Picture(inside(folder, one["file"]), str(one["caption"])) for one in shown)
            for name, shown in listed.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no list of pictures ({error}); evaluate the run again") from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder; DataError where a list made elsewhere names one outside of it."""
    path = folder / name
    if leads_out(path, folder):
        raise DataError(f"a list of pictures in {folder} names {name!r}, outside its folder; evaluate the run again")
    return path


def decoded(path: Path) -> Image.Image:
    """The pixels of a picture, RGB."""
    from mmpretrain.core.image_bytes import opened_image  # image libraries, which runs without pictures do without

    try:
        with opened_image(path.read_bytes()) as image:
            return image.convert("RGB")
    except (OSError, SampleError) as error:
        raise DataError(f"{path} cannot be shown: {error}; evaluate the run again") from error
