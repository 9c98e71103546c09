"""`data pack`: a folder of media and a table of captions become WebDataset shards, indexed.

Enter: the folder and the table. Leave: `00000.tar`, ... with their indexes, `manifest.json`, and `pack-report.jsonl`
with a row per file that could not be used. Refused: too large a share of such files, a folder with another packing.

A sample is its media file under the extension that its content has, with those that further folders hold under the same
name (the sound of a picture), a `.json` with all `captions` and the source `file`, and a `.txt` with the first caption.
Every WebDataset reader takes that: open_clip and readers of img2dataset's shards take the whole `.txt` as one caption,
so several, one a line, would run together; ours are all in the `.json`.

Shard i holds the candidates [i N, (i + 1) N) in the order of their keys, less those that were dropped, so the bytes
do not depend on the number of workers, and a shard that stands is never written again.
"""

import hashlib
import json
import uuid
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from data_pipeline.collection import contents_of, save_collection
from data_pipeline.index import load_or_build_index
from data_pipeline.limits import MAX_SAMPLE_BYTES
from data_pipeline.pack_sources import Dropped, PackEntry, plan_entries, read_captions
from data_pipeline.parallel import run_parallel
from data_pipeline.part import Part
from data_pipeline.resize import Resize, shrink
from data_pipeline.shard_writer import finish_shard, shard_paths, write_unfinished
from data_pipeline.sniff import usable_extension
from mmpretrain.core.captions import METADATA_EXTENSION, TEXT_EXTENSION
from mmpretrain.core.errors import ConfigError, DataError, SampleError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.media_types import IMAGE_EXTENSIONS
from mmpretrain.core.run_files import whole_rows

MANIFEST = "manifest.json"
REPORT = "pack-report.jsonl"
_PART_REPORT = "pack-report.part-{}-of-{}.jsonl"


@dataclass(frozen=True)
class PackSummary:
    """What a packing holds; saved in its manifest."""

    shards: int
    samples: int
    captions: int
    dropped: int
    unlisted: int
    """Files of the folder that the table does not name."""
    joined: int = 0
    """Files of further folders."""
    smaller: int = 0
    """Images whose shorter side was below that of `--resize` and that stand as they were."""


@dataclass(frozen=True)
class _Shard:
    """One shard to be written, and once it is, what became of its candidates."""

    path: Path
    entries: tuple[PackEntry, ...]
    dropped: tuple[Dropped, ...] = ()


def pack(
    folder: Path,
    captions: Path,
    out: Path,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    max_bad: float = 0.05,
    join: Sequence[Path] | None = None,
    part: Part | None = None,
    resize: int | None = None,
    quality: int = 90,
) -> PackSummary | None:
    """Pack and index; an interrupted packing goes on when it is called again with the same options.

    With a `part`, its shards alone are written and there is no summary; a last call without one joins all parts.

    Files of the folders `join` go to the sample of the same name, whatever their suffix. With `resize`, images whose
    shorter side is longer become JPEGs of that size and `quality`; their .json keeps the `original_size`.

    Files that cannot be used are dropped and listed in `pack-report.jsonl`; past the fraction `max_bad` of the files
    that the table names that is a DataError.
    """
    further = tuple(join or ())
    _check_options((folder, *further), samples_per_shard, max_bad, resize, quality)
    wanted = None if resize is None else Resize(resize, quality)
    table = read_captions(captions, image_column, caption_column)
    entries, absent = plan_entries(folder, table, further)
    _check_share(absent, len(table), max_bad, captions)
    plan = {"samples_per_shard": samples_per_shard, "candidates": len(entries), "sha256": _fingerprint(folder, entries)}
    plan |= {"resize": resize, "quality": None if resize is None else quality}
    _open_packing(out, plan)
    shards = _divide(entries, out, samples_per_shard)
    if part is not None:
        _write_missing(part.take(shards), folder, wanted, out / _PART_REPORT.format(part.number, part.of), workers)
        return None
    _gather_part_reports(out)
    broken = _write_missing(shards, folder, wanted, out / REPORT, workers)
    dropped = sorted([*absent, *broken], key=lambda row: row.path)
    _write_rows(out / REPORT, dropped)
    lost = {row.path for row in broken}
    packed = [entry for entry in entries if entry.path not in lost]
    standing = [shard.path for shard in shards if shard.path.exists()]
    save_collection(out, {path.name: contents_of(load_or_build_index(path)) for path in standing})
    summary = PackSummary(
        shards=len(standing),
        samples=len(packed),
        captions=sum(len(entry.captions) for entry in packed),
        dropped=len(dropped),
        unlisted=_count_unlisted(folder, out, table),
        joined=sum(len(entry.joined) for entry in packed),
        smaller=0 if resize is None else sum(_count_smaller(path, resize) for path in standing),
    )
    _check_share(dropped, len(table), max_bad, captions)
    _write_manifest(out, plan, summary, [path.name for path in standing])
    _say(summary, out, len(further))
    return summary


def _count_smaller(shard: Path, shorter: int) -> int:
    facts = load_or_build_index(shard).facts
    sides = np.minimum(facts.width, facts.height)
    return int(((sides > 0) & (sides < shorter)).sum())


def _check_options(
    folders: Iterable[Path], samples_per_shard: int, max_bad: float, resize: int | None, quality: int
) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"media folder {folder} does not exist")
    if samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard is {samples_per_shard}; give at least 1")
    if not 0 <= max_bad <= 1:
        raise ConfigError(f"--max-bad is {max_bad}; give a fraction from 0 to 1")
    if resize is not None and resize < 1:
        raise ConfigError(f"--resize is {resize}; give the pixels of the shorter side, e.g. 256")
    if not 1 <= quality <= 95:
        raise ConfigError(f"--quality is {quality}; give 1 to 95, what a JPEG takes")


def _check_share(dropped: list[Dropped], total: int, max_bad: float, table: Path) -> None:
    if len(dropped) > max_bad * total:
        shown = "; ".join(f"{row.path}: {row.reason}" for row in dropped[:3])
        raise DataError(
            f"{len(dropped)} of the {total} files that {table} names cannot be used, more than --max-bad {max_bad:g}: "
            f"{shown}{'; ...' if len(dropped) > 3 else ''}. Repair them, or allow a larger --max-bad"
        )


def _fingerprint(folder: Path, entries: Iterable[PackEntry]) -> str:
    """Changes with the files' names and sizes and with the captions, not with where the folder stands."""
    digest = hashlib.sha256()
    for entry in entries:
        size = (folder / entry.path).stat().st_size
        joined = [(path.name, path.stat().st_size) for path in entry.joined]
        digest.update(json.dumps([entry.key, entry.path, size, entry.captions, *joined]).encode())
    return digest.hexdigest()


def _open_packing(out: Path, plan: dict[str, object]) -> None:
    """Say what this folder will hold; refuse one that holds something else."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).exists():
        found = _read_plan(out)
        changed = [name for name in plan if found.get(name) != plan[name]]
        if changed:
            raise ConfigError(
                f"{out} holds a packing of other input or options ("
                + ", ".join(f"{name} {found.get(name)} there, {plan[name]} now" for name in changed)
                + "); give another --out, or delete that folder"
            )
        return
    if any(out.glob("*.tar")):
        raise ConfigError(f"{out} holds shards that `data pack` did not write; give another --out")
    _write_manifest(out, plan, None)


def _read_plan(out: Path) -> dict[str, object]:
    try:
        plan = parse_json((out / MANIFEST).read_text())["plan"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / MANIFEST} is not what `data pack` wrote ({error}); give another --out") from error
    if not isinstance(plan, dict):
        raise ConfigError(f"{out / MANIFEST} is not what `data pack` wrote; give another --out")
    return plan


def _write_manifest(out: Path, plan: dict[str, object], summary: PackSummary | None, names: Sequence[str] = ()) -> None:
    """`names` are those of the shards, which a server without listings cannot tell otherwise."""
    content = {"plan": plan, "complete": summary is not None} | (asdict(summary) if summary else {}) | {"names": names}
    unfinished = out / f".{MANIFEST}.{uuid.uuid4().hex}"  # parts write it at the same time
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(out / MANIFEST)


def _divide(entries: list[PackEntry], out: Path, samples_per_shard: int) -> list[_Shard]:
    starts = range(0, len(entries), samples_per_shard)
    paths = shard_paths(out, len(starts))
    return [
        _Shard(path, tuple(entries[start : start + samples_per_shard]))
        for path, start in zip(paths, starts, strict=True)
    ]


def _gather_part_reports(out: Path) -> None:
    """What parts dropped, into the one report."""
    parts = sorted(out.glob(_PART_REPORT.format("*", "*")))
    rows = [row for report in (out / REPORT, *parts) for row in _read_rows(report)]
    _write_rows(out / REPORT, dict.fromkeys(rows))  # each once, also where this was interrupted
    for report in parts:
        report.unlink()


def _write_missing(
    shards: list[_Shard], folder: Path, resize: Resize | None, report: Path, workers: int | None
) -> list[Dropped]:
    """Write the shards that do not stand yet; what was dropped from all of them.

    A shard counts as standing once its own drops are on disk: they are appended first, its tar is renamed after.
    """
    standing = {entry.path for shard in shards if shard.path.exists() for entry in shard.entries}
    broken = [row for row in _read_rows(report) if row.path in standing]
    _write_rows(report, broken)

    def settle(shard: _Shard) -> None:
        broken.extend(shard.dropped)
        with report.open("a") as file:
            file.writelines(_as_line(row) for row in shard.dropped)
        if len(shard.dropped) < len(shard.entries):
            finish_shard(shard.path)

    missing = [shard for shard in shards if not shard.path.exists()]
    run_parallel(partial(_write_shard, folder, resize), missing, workers, "packing", settle)
    return broken


def _write_shard(folder: Path, resize: Resize | None, shard: _Shard) -> _Shard:
    dropped: list[Dropped] = []
    write_unfinished(shard.path, _usable_samples(folder, resize, shard.entries, dropped))
    return replace(shard, dropped=tuple(dropped))


def _usable_samples(
    folder: Path, resize: Resize | None, entries: Iterable[PackEntry], dropped: list[Dropped]
) -> Iterator[dict[str, str | bytes]]:
    for entry in entries:
        try:
            yield _sample(folder, resize, entry)
        except SampleError as error:
            dropped.append(Dropped(entry.path, str(error)))


def _sample(folder: Path, resize: Resize | None, entry: PackEntry) -> dict[str, str | bytes]:
    media: dict[str, bytes] = {}
    described: dict[str, object] = {"captions": entry.captions, "file": entry.path}
    for path in (folder / entry.path, *entry.joined):
        extension, content = _media(path)
        if resize is not None and extension in IMAGE_EXTENSIONS and (resized := shrink(content, resize)):
            extension, content = "jpg", resized.content
            described["original_size"] = [resized.width, resized.height]
        if extension in media:
            raise SampleError(f"two of its files hold {extension}, and a sample has one of each: {path.name} is one")
        media[extension] = content
    return {
        "__key__": entry.key,
        **media,
        METADATA_EXTENSION: json.dumps(described, ensure_ascii=False).encode(),
        TEXT_EXTENSION: entry.captions[0].encode(),
    }


def _media(path: Path) -> tuple[str, bytes]:
    """The true extension and the content of a file."""
    try:
        size = path.stat().st_size
        if size > MAX_SAMPLE_BYTES:
            raise SampleError(f"the file has {size} bytes, more than the {MAX_SAMPLE_BYTES} that a sample may hold")
        content = path.read_bytes()
    except OSError as error:
        raise SampleError(f"the file cannot be read: {error.strerror}") from error
    return usable_extension(content), content


def _count_unlisted(folder: Path, out: Path, table: Container[str]) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(out))
    return sum(path.relative_to(folder).as_posix() not in table for path in files)


def _read_rows(report: Path) -> list[Dropped]:
    """Without a last row that a kill cut off, whose shard does not stand."""
    return [Dropped(**row) for row in whole_rows(report)]


def _write_rows(report: Path, rows: Iterable[Dropped]) -> None:
    unfinished = report.with_name(f".{report.name}")
    unfinished.write_text("".join(_as_line(row) for row in rows))
    unfinished.replace(report)


def _as_line(row: Dropped) -> str:
    return json.dumps(asdict(row)) + "\n"


def _say(summary: PackSummary, out: Path, num_further: int) -> None:
    text = f"packed {summary.samples} samples with {summary.captions} captions into {summary.shards} shards in {out}"
    if num_further:
        text += f"; {summary.joined} files of further folders joined them"
        if lacking := num_further * summary.samples - summary.joined:
            text += f", {lacking} are lacking"
    if summary.dropped:
        text += f"; dropped {summary.dropped} files, listed in {out / REPORT}"
    if summary.smaller:
        text += f"; {summary.smaller} images were smaller than --resize and stand as they were"
    if summary.unlisted:
        text += f"; {summary.unlisted} files of the folder are not in the table"
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)
