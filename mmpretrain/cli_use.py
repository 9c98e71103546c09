"""`mmpretrain embed`, `search`, `classify` and `export-onnx`: a trained model at work.

Enter: a run folder, checkpoint or published folder, and what it shall read. Leave: files of embeddings, tables, result
sheets, ONNX graphs. Refuses as the functions do that are called here. What was broken is counted on stderr.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmpretrain.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmpretrain.inference.stream import Broken

LONGEST_LINE = 10_000
"""Characters of a table's line in a pipe or file, where nothing is wrapped."""

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A published folder, a run folder or a checkpoint.")]
Input = Annotated[str, typer.Argument(metavar="INPUT", help="Folder of media, shards, or a CSV or JSONL of texts.")]
Modalities = Annotated[list[str] | None, typer.Option("--modality", help="Only this one; may be repeated.")]
Batch = Annotated[int, typer.Option(min=1, help="Inputs per call of the model.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that decode.")]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of the samples that may be broken.")]
Strict = Annotated[bool, typer.Option("--strict", help="No sample may be broken.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of texts in a table; else found by name.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one if left out.")]


def embed_command(
    model: ModelPath,
    given: Input,
    out: Annotated[Path, typer.Option(help="A .parquet file; for npy a new folder.")],
    modality: Modalities = None,
    layout: Annotated[Literal["parquet", "npy"], typer.Option("--format", help="How vectors are kept.")] = "parquet",
    batch: Batch = 64,
    threads: Threads = 2,
    max_bad: MaxBad = 0.05,
    strict: Strict = False,
    text_column: TextColumn = None,
    device: Device = None,
) -> None:
    """Embed everything in a folder, in shards or in a table; started again, it goes on where it was interrupted."""
    from mmpretrain.inference.embedding import broken_path, check_share, embed
    from mmpretrain.inference.inputs import open_inputs
    from mmpretrain.inference.opening import load

    inputs = open_inputs(given, text_column)
    report = embed(load(model, device), inputs, given, out, modality or (), layout, batch, threads)
    for name, count in report.rows.items():
        typer.echo(f"{count} {name} vectors")
    typer.echo(f"embeddings in {out}")
    _count(report.broken, report.unused, broken_path(out))
    check_share(report.broken, len(inputs), 0 if strict else max_bad, broken_path(out))


def search_command(
    model: ModelPath,
    embeddings: Annotated[Path, typer.Argument(metavar="EMBEDDINGS", help="What `mmpretrain embed` wrote.")],
    text: Annotated[str | None, typer.Option(help="A text to look for.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to look for.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A recording to look for.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to look for.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many rows.")] = 10,
    modality: Modalities = None,
    sheet: Annotated[Path | None, typer.Option(help="A PNG of the rows found.")] = None,
    device: Device = None,
) -> None:
    """Find the rows nearest to a text, picture, recording or video."""
    queries = {"text": text, "image": image, "audio": audio, "video": video}
    asked = [(kind, query) for kind, query in queries.items() if query is not None]
    if len(asked) != 1:
        raise ConfigError("give one query: --text, --image, --audio or --video")
    from mmpretrain.inference.opening import load
    from mmpretrain.inference.searching import open_for, search

    (kind, query), loaded = asked[0], load(model, device)
    hits = search(loaded, open_for(loaded, embeddings), kind, query, top, modality or ())
    rows = [
        (str(number), f"{hit.score:.4f}", hit.row.modality, hit.row.key, hit.row.text or "")
        for number, hit in enumerate(hits, 1)
    ]
    _show(("", "cosine", "modality", "key", "text"), rows)
    if sheet is not None:
        from mmpretrain.inference.sheet import write_sheet

        typer.echo(f"sheet {write_sheet(hits, query, sheet)}")


def classify_command(
    model: ModelPath,
    given: Input,
    classes: Annotated[str | None, typer.Option(help="Zero-shot: names, a comma between, or a classes.json.")] = None,
    template: Annotated[list[str] | None, typer.Option(help='E.g. "a photo of a {}."; may be repeated.')] = None,
    objective: Annotated[str | None, typer.Option(help="A trained head, by its objective.")] = None,
    modality: Annotated[str | None, typer.Option(help="What zero-shot reads; else the only one.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes per sample.")] = 5,
    out: Annotated[Path | None, typer.Option(help="A CSV of the answers; else they are printed.")] = None,
    batch: Batch = 64,
    threads: Threads = 2,
    max_bad: MaxBad = 0.05,
    strict: Strict = False,
    device: Device = None,
) -> None:
    """Name the classes of every sample: any classes by their names, or those a head was trained on."""
    if classes is not None and objective is not None:
        raise ConfigError("--classes is zero-shot and --objective a trained head; give one of both")
    if classes is None and (template or modality):
        raise ConfigError("--template and --modality are for zero-shot; name --classes too")
    from mmpretrain.inference.classifying import classes_of, classify, trained_head, write_csv, zero_shot
    from mmpretrain.inference.embedding import check_share
    from mmpretrain.inference.inputs import open_inputs
    from mmpretrain.inference.opening import load

    known = None if classes is None else classes_of(classes, template or ())
    loaded = load(model, device)
    classifier = trained_head(loaded, objective) if known is None else zero_shot(loaded, known, modality)
    inputs = open_inputs(given, by_stem=len(classifier.modalities) > 1)
    report = classify(loaded, classifier, inputs, top, batch, threads)
    if out is not None:
        write_csv(report, out)
        typer.echo(f"{len(report.answers)} answers in {out}")
    else:
        best = [", ".join(f"{name} {value:.3f}" for name, value in answer.best) for answer in report.answers]
        keys = [answer.name.key for answer in report.answers]
        _show(("key", report.meaning), list(zip(keys, best, strict=True)))
    _count(report.broken, report.unused, None)
    check_share(report.broken, len(inputs), 0 if strict else max_bad, None)


def export_onnx_command(
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="New folder for the graphs.")],
    graph: Annotated[list[str] | None, typer.Option(help="Only this one, e.g. image; may be repeated.")] = None,
) -> None:
    """Write each tower, and each trained head, as an ONNX graph, compared with PyTorch before it counts."""
    from mmpretrain.inference.onnx_export import export_onnx
    from mmpretrain.inference.opening import load

    for name, difference in export_onnx(load(model, "cpu"), out, graph or ()).items():
        typer.echo(f"{out / name}.onnx  largest difference from PyTorch {difference:.1e}")


def add_use_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command("embed")(embed_command)
    app.command("search")(search_command)
    app.command("classify")(classify_command)
    app.command("export-onnx")(export_onnx_command)


def _show(heading: "Sequence[str]", rows: "Sequence[Sequence[str]]") -> None:
    """A table on stdout; its lines stay whole where no person watches."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, view = Console(), Table(*heading, box=None)
    for row in rows:
        view.add_row(*map(Text, row))
    if not console.is_terminal:
        console.width = LONGEST_LINE
    console.print(view)


def _count(broken: "Sequence[Broken]", unused: int, listed: Path | None) -> None:
    """Say on stderr what gave no answer."""
    if unused:
        typer.echo(f"{unused} samples hold nothing that was asked for", err=True)
    for each in broken[:10]:
        typer.echo(f"broken: {each.key}: {each.reason}", err=True)
    if broken:
        where = "" if listed is None else f", all listed in {listed}"
        typer.echo(f"{len(broken)} samples could not be used{where}", err=True)
