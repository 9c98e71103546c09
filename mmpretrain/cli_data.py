"""`mmpretrain data`: make, pack, index, check and look at shards.

Enter: folders, globs or tars. Leave: shards, indexes, pictures and what was found. Refuses as the functions do that
are called here; their defaults stand again in the signatures for `--help`, and a test holds them equal.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

data_commands = typer.Typer(help="Make, pack, index, check and look at shards.", no_args_is_help=True)

Shards = Annotated[list[str], typer.Argument(metavar="SHARDS", help="Folders, globs, brace ranges or tars.")]
Out = Annotated[Path, typer.Option(help="Folder for the shards.")]
OnePart = Annotated[str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts alone, from 0.")]
To = Annotated[str | None, typer.Option(help="slurm: queue it as an array of tasks.")]
Tasks = Annotated[int | None, typer.Option(min=1, help="How many tasks, with --to.")]
ClusterFile = Annotated[Path | None, typer.Option(help="Cluster file, with --to.")]
Workers = Annotated[int | None, typer.Option(help="Processes; by default one per processor.")]
SamplesPerShard = Annotated[int, typer.Option(help="Samples in a shard; the last may have fewer.")]


@data_commands.command("make")
def make_command(
    out: Out,
    samples: Annotated[int, typer.Option(help="Training samples; val and heldout come on top.")] = 6000,
    seed: Annotated[int, typer.Option(help="Decides every byte.")] = 0,
    image_size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 64,
    samples_per_shard: SamplesPerShard = 500,
    workers: Workers = None,
) -> None:
    """Draw the synthetic set: coloured shapes with captions, some combinations held out."""
    from data_pipeline.make import make

    make(out, samples, seed, image_size, samples_per_shard, workers)


@data_commands.command("pack")
def pack_command(
    folder: Annotated[Path, typer.Argument(help="Folder of media.")],
    captions: Annotated[Path, typer.Option(help="CSV, JSONL or Parquet: one row per caption.")],
    out: Out,
    samples_per_shard: SamplesPerShard = 1000,
    workers: Workers = None,
    image_column: Annotated[str | None, typer.Option(help="Column of file names; else found by name.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions; else found by name.")] = None,
    max_bad: Annotated[float, typer.Option(help="Share of the files that may be unusable.")] = 0.05,
    join: Annotated[
        list[Path] | None, typer.Option(help="Folder whose files join the sample of the same name; may be repeated.")
    ] = None,
    part: OnePart = None,
    resize: Annotated[int | None, typer.Option(help="Longest shorter side of an image, in pixels.")] = None,
    quality: Annotated[int, typer.Option(help="Of the JPEGs that --resize writes, 1 to 95.")] = 90,
    to: To = None,
    tasks: Tasks = None,
    cluster: ClusterFile = None,
) -> None:
    """Pack media and their captions into shards; started again, it goes on where it was interrupted."""
    from data_pipeline.pack import pack
    from data_pipeline.part import parse_part

    if to is not None:
        options = {"--captions": captions, "--out": out, "--samples-per-shard": samples_per_shard, "--workers": workers}
        options |= {"--image-column": image_column, "--caption-column": caption_column, "--max-bad": max_bad}
        options |= {"--resize": resize, "--quality": quality}
        joins = [word for one in join or () for word in ("--join", str(one))]
        _submit(["pack", str(folder), *_words(options), *joins], to, tasks, cluster, joined=True)
        return
    share = None if part is None else parse_part(part)
    pack(
        folder,
        captions,
        out,
        samples_per_shard,
        workers,
        image_column,
        caption_column,
        max_bad,
        join,
        share,
        resize,
        quality,
    )


@data_commands.command("index")
def index_command(
    shards: Shards,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Index again, also shards that changed.")] = False,
    workers: Workers = None,
    part: OnePart = None,
    to: To = None,
    tasks: Tasks = None,
    cluster: ClusterFile = None,
) -> None:
    """Write beside each shard where its samples lie."""
    from data_pipeline.indexing import index_shards
    from data_pipeline.part import parse_part

    if to is not None:
        flags = ["--rebuild"] if rebuild else []
        _submit(["index", *shards, *flags, *_words({"--workers": workers})], to, tasks, cluster, joined=False)
        return
    index_shards(shards, rebuild, workers, None if part is None else parse_part(part))


def _words(options: Mapping[str, object]) -> list[str]:
    """Options that were given, as words of a command line."""
    return [word for name, value in options.items() if value is not None for word in (name, str(value))]


def _submit(arguments: list[str], to: str, tasks: int | None, cluster: Path | None, joined: bool) -> None:
    from mmpretrain.cli_tasks import submit_array

    typer.echo(f"submitted {tasks} tasks as job {submit_array(arguments, to, tasks, cluster, joined)}")


@data_commands.command("check")
def check_command(shards: Shards, workers: Workers = None) -> None:
    """Name truncated tars, repeated keys and members that cannot be decoded; exits 3 if there are any."""
    from data_pipeline.check import check

    check(shards, workers)


@data_commands.command("stats")
def stats_command(shards: Shards, workers: Workers = None) -> None:
    """Count samples, members and bytes; show sizes and lengths."""
    from data_pipeline.stats import stats

    stats(shards, workers)


@data_commands.command("ledger")
def ledger_command(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Prove from what every step consumed that no sample was lost or repeated; exits 3 naming those that were."""
    from mmpretrain.training.accounting import prove

    prove(run)


@data_commands.command("preview")
def preview_command(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("preview.png"),
    samples: Annotated[int, typer.Option(help="Pictures, spread evenly over the shards.")] = 20,
    columns: Annotated[int, typer.Option(help="Pictures in a row.")] = 5,
) -> None:
    """Draw a contact sheet of pictures with their captions."""
    from data_pipeline.preview import preview

    preview(shards, out, samples, columns)
