"""`mmpretrain embed`: a folder of media, shards or a table of texts becomes a file of embeddings.

Enter: a model, inputs, a target. Leave: embeddings, and beside them the list of the samples that could not be used. It
works by parts that are kept until the end, so that a second call goes on where the first was interrupted. Refused: a
target that exists, inputs without anything the model reads; too many broken samples, once all others are embedded.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmpretrain.core.errors import AbsentError, ConfigError, DataError, SampleError
from mmpretrain.core.progress import progress_bar
from mmpretrain.core.types import Array
from mmpretrain.evaluation.base import CaptionCodec
from mmpretrain.inference.inputs import SampleInputs
from mmpretrain.inference.model import Model
from mmpretrain.inference.processor import Processor, stack
from mmpretrain.inference.store import (
    EmbeddedRow,
    Format,
    Header,
    Vectors,
    join_parts,
    read_record,
    table_of,
    write_part,
)
from mmpretrain.inference.stream import Broken, decode_all

PART_SAMPLES = 2048
MAX_BAD = 0.05
Fields = Mapping[str, Array]


@dataclass(frozen=True)
class _Found:
    """What one sample gives: a modality that is broken does not cost it the others."""

    rows: list[tuple[str, str | None, Fields]]
    """(modality, the text if it is one, fields)."""
    reasons: list[str]


@dataclass(frozen=True)
class EmbedReport:
    """What became of the samples."""

    out: Path
    rows: Mapping[str, int]
    """Modality -> vectors."""
    broken: tuple[Broken, ...]
    unused: int
    """Samples that hold nothing the model was asked to read."""


@dataclass(frozen=True)
class _Part:
    rows: dict[str, int]
    broken: list[dict[str, str]]
    unused: int


def embed(
    model: Model,
    inputs: SampleInputs,
    given: str,
    out: Path,
    modalities: Sequence[str] = (),
    layout: Format = "parquet",
    batch: int = 64,
    threads: int = 2,
) -> EmbedReport:
    """Embed everything; `given` is the input as the user named it, `modalities` empty means all that fit."""
    if out.exists():
        raise ConfigError(f"{out} exists; remove it, or write the embeddings elsewhere")
    if layout == "parquet" and out.suffix != ".parquet":
        raise ConfigError(f"{out} would hold Parquet; end its name in .parquet, or take --format npy for a folder")
    chosen = choose_modalities(model.processor, inputs, modalities)
    parts = _open_parts(model, inputs, out, chosen)
    paths = [parts / f"{number:06d}.parquet" for number in range(-(-len(inputs) // PART_SAMPLES))]
    with progress_bar() as progress:
        task = progress.add_task("embedding", total=len(inputs))
        for number, path in enumerate(paths):
            numbers = range(number * PART_SAMPLES, min((number + 1) * PART_SAMPLES, len(inputs)))
            if path.exists():
                progress.advance(task, len(numbers))
            else:
                _embed_part(model, inputs, numbers, chosen, path, batch, threads, lambda: progress.advance(task))
    report = _report(out, [_Part(**read_record(path)) for path in paths])  # type: ignore[arg-type]
    _refuse_empty(report, given, chosen)
    header = Header(model.fingerprint, str(model.source.absolute()), model.network.facts.embed_dim, given)
    join_parts(paths, out, layout, header)
    write_broken(broken_path(out), report.broken)
    shutil.rmtree(parts)
    return report


def choose_modalities(processor: Processor, inputs: SampleInputs, asked: Sequence[str]) -> tuple[str, ...]:
    """The modalities asked for, or all that fit the kind of input: texts of a folder count only when asked for."""
    for modality in asked:
        processor.decoder(modality)
    if asked:
        return tuple(asked)
    is_text = {name: isinstance(codec.decoder, CaptionCodec) for name, codec in processor.codecs.items()}
    wanted = {"folder": (False,), "table": (True,), "shards": (False, True)}[inputs.kind]
    chosen = tuple(name for name, text in is_text.items() if text in wanted)
    if not chosen:
        raise DataError(f"the model reads {', '.join(is_text)}, and the input is a {inputs.kind} of something else")
    return chosen


def check_share(broken: Sequence[Broken], total: int, max_bad: float, listed: Path | None) -> None:
    """Raise DataError when more than a share of the samples could not be used."""
    if len(broken) > max_bad * total:
        first = broken[0]
        where = "" if listed is None else f"; all are listed in {listed}"
        raise DataError(
            f"{len(broken)} of {total} samples could not be used, more than the {max_bad:.1%} allowed; the first is "
            f"{first.key} of {first.path}: {first.reason}{where}"
        )


def broken_path(out: Path) -> Path:
    """Where the samples that could not be used are listed."""
    return out.with_name(f"{out.stem}.broken.jsonl")


def write_broken(path: Path, broken: Sequence[Broken]) -> None:
    """One line each; no file where there are none."""
    path.unlink(missing_ok=True)
    if broken:
        lines = (json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in broken)
        path.write_text("".join(lines), encoding="utf-8")


def _open_parts(model: Model, inputs: SampleInputs, out: Path, modalities: Sequence[str]) -> Path:
    """The folder of parts, new or of an interrupted call that was asked for the same."""
    parts = out.with_name(f".{out.name}.parts")
    plan = {
        "model": model.fingerprint,
        "inputs": inputs.digest,
        "samples": len(inputs),
        "part_samples": PART_SAMPLES,
        "modalities": sorted(modalities),
    }
    path = parts / "plan.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != plan:
        raise ConfigError(
            f"{parts} holds parts of an interrupted call with another model, other inputs or modalities; remove it to "
            "begin anew"
        )
    parts.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan), encoding="utf-8")
    return parts


def _embed_part(
    model: Model,
    inputs: SampleInputs,
    numbers: Sequence[int],
    modalities: Sequence[str],
    path: Path,
    batch: int,
    threads: int,
    advance: Callable[[], None],
) -> None:
    rows: list[EmbeddedRow] = []
    queues: dict[str, list[tuple[int, Fields]]] = {modality: [] for modality in modalities}
    vectors: dict[int, Vectors] = {}
    broken: list[dict[str, str]] = []
    unused = 0
    for one in decode_all(inputs, numbers, lambda members: _rows_of(model.processor, members, modalities), threads):
        advance()
        found = one.result or _Found([], [one.reason or ""])
        broken += [asdict(Broken(one.name.key, one.name.path, reason)) for reason in found.reasons]
        unused += not (found.rows or found.reasons)
        for modality, text, fields in found.rows:
            queues[modality].append((len(rows), fields))
            rows.append(EmbeddedRow(one.name.key, one.name.path, one.name.ordinal, modality, text))
            if len(queues[modality]) == batch:
                vectors |= _flush(model, modality, queues[modality])
    for modality, queue in queues.items():
        vectors |= _flush(model, modality, queue)
    stacked = np.stack([vectors[n] for n in range(len(rows))]) if rows else _no_vectors(model)
    counts = {modality: sum(row.modality == modality for row in rows) for modality in modalities}
    write_part(path, table_of(rows, stacked), asdict(_Part(counts, broken, unused)))


def _rows_of(processor: Processor, members: Mapping[str, bytes], modalities: Sequence[str]) -> _Found:
    """Every row that a sample gives; a text modality one for each caption."""
    found = _Found([], [])
    for modality in modalities:
        try:
            found.rows.extend(_rows_of_modality(processor, members, modality))
        except AbsentError:
            continue  # a video without sound is not broken
        except SampleError as error:
            found.reasons.append(f"{modality}: {error}")
    return found


def _rows_of_modality(
    processor: Processor, members: Mapping[str, bytes], modality: str
) -> Iterator[tuple[str, str | None, Fields]]:
    decoder = processor.decoder(modality)
    if isinstance(decoder, CaptionCodec):
        texts = decoder.captions(members)
        encoded = decoder.encode(texts)
        for number, text in enumerate(texts):
            yield modality, text, {name: array[number] for name, array in encoded.items()}
    elif decoder.extensions & members.keys():
        yield modality, None, decoder.decode(members, None)


def _flush(model: Model, modality: str, queue: list[tuple[int, Fields]]) -> dict[int, Vectors]:
    """Embed what waits; row number -> vector."""
    if not queue:
        return {}
    found: Vectors = model.embed_fields(modality, stack([fields for _, fields in queue])).numpy()
    numbers = [number for number, _ in queue]
    queue.clear()
    return dict(zip(numbers, found, strict=True))


def _no_vectors(model: Model) -> Vectors:
    return np.empty((0, model.network.facts.embed_dim), np.float32)


def _report(out: Path, parts: Sequence[_Part]) -> EmbedReport:
    rows: dict[str, int] = {}
    for part in parts:
        for modality, count in part.rows.items():
            rows[modality] = rows.get(modality, 0) + count
    broken = tuple(Broken(**each) for part in parts for each in part.broken)
    return EmbedReport(out, rows, broken, sum(part.unused for part in parts))


def _refuse_empty(report: EmbedReport, given: str, modalities: Sequence[str]) -> None:
    if any(report.rows.values()):
        return
    why = f"; the first broken one is {report.broken[0].key}: {report.broken[0].reason}" if report.broken else ""
    raise DataError(f"{given} holds nothing of {', '.join(modalities)} that can be embedded{why}")
