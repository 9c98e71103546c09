"""Whether what a list names, or what stands in a folder, really lies in that folder.

Enter: a folder, and a path or a name. Leave: the answer; whoever asked says what is refused.
"""

from pathlib import Path, PurePosixPath


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path below a folder leads out of it, by `..` or by a link."""
    return not path.resolve().is_relative_to(folder.resolve())


def is_plain_name(name: object) -> bool:
    """Whether it names something right inside a folder, and nothing else."""
    return isinstance(name, str) and name not in ("", "..") and "\0" not in name and PurePosixPath(name).name == name
