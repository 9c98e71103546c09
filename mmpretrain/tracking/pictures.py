"""What the newest evaluation of a run left to look at, read back from its folder.

Enter: a run folder. Leave: pictures by name, with their captions; none where no task left any. Refused: a list that
names files outside the folder.
"""

import json
from pathlib import Path

from mmpretrain.core.errors import DataError
from mmpretrain.core.run_files import PICTURES
from mmpretrain.core.types import Picture, Pictures


def read_pictures(run_dir: Path) -> Pictures:
    """As `evaluation/pictures.json` lists them."""
    folder = run_dir / "evaluation"
    path = folder / PICTURES
    listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        name: tuple(Picture(inside(folder, one["file"]), one["caption"]) for one in shown)
        for name, shown in listed.items()
    }


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder; DataError where a list made elsewhere names one outside of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"a list of pictures in {folder} names {name!r}, outside its folder; evaluate the run again")
    return path
