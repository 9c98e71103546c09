"""The loader: one stream of batches, whatever ranks, workers, restarts and damaged samples do."""

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig, WeightChange
from data_pipeline.ledger import Ledger, read_ledger
from data_pipeline.loader import Loader, build_loader
from data_pipeline.reader import SampleReader, open_sources
from data_pipeline.sequential import iterate_all
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.seeding import row_key
from mmpretrain.core.types import Array, Batch, FieldSpec, Skip
from mmpretrain.modalities.label import LabelCodecConfig

GLOBAL_BATCH = 12


@dataclass(frozen=True)
class NumberCodec:
    """Reads a number from a .txt member and draws another one."""

    name: str = "number"

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {self.name: FieldSpec((2,), "int64"), f"{self.name}.present": FieldSpec((), "bool")}

    @property
    def extensions(self) -> frozenset[str]:
        return frozenset({"txt"})

    @property
    def required(self) -> bool:
        return True

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        if "txt" not in members:
            raise SampleError(f"no number (saw: {', '.join(members)})")
        try:
            number = int(members["txt"])
        except ValueError as error:
            raise SampleError(f"{members['txt']!r} is no number") from error
        drawn = -1 if draw is None else draw.integers(1 << 30)
        return {self.name: np.array([number, drawn]), f"{self.name}.present": np.array(True)}


def write_shard(path: Path, values: Iterable[object], extension: str = "txt") -> None:
    """One sample a value; its key is its number in the shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number, value in enumerate(values):
            writer.write({"__key__": f"{number:03}", extension: str(value).encode()})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """50 numbers in shards of 20, 20 and 10."""
    for number, start in enumerate((0, 20, 40)):
        write_shard(tmp_path / "shards" / f"{number}.tar", range(start, min(start + 20, 50)))
    return tmp_path / "shards"


def load(
    sources: Mapping[str, Path] | Path,
    world: World = World(),  # noqa: B008 - frozen
    micro: int | None = None,
    workers: int = 0,
    start: int = 0,
    steps: int = 10,
    seed: int = 3,
    **fields: object,
) -> Loader:
    named = {"main": sources} if isinstance(sources, Path) else sources
    mixture = MixtureConfig(sources={name: SourceConfig(shards=(str(path),)) for name, path in named.items()})
    config = DataConfig(**{"train": mixture, "workers": workers, **fields})  # type: ignore[arg-type]
    plan = BatchPlan(GLOBAL_BATCH, micro or GLOBAL_BATCH // world.size, world)
    return build_loader(config, {"number": NumberCodec()}, plan, seed, start, steps)


def flat(steps: Iterable[list[Batch]]) -> list[tuple[str, int, int, int]]:
    """(key, number, drawn number, position) of every row in order."""
    rows = []
    for batch in itertools.chain.from_iterable(steps):
        assert len(batch.keys) == len(batch.tensors["number"])
        numbers, positions = batch.tensors["number"].tolist(), batch.tensors["position"].tolist()
        rows += [(key, *number, position) for key, number, position in zip(batch.keys, numbers, positions, strict=True)]
    return rows


def test_each_key_of_an_epoch_occurs_once(shards: Path) -> None:
    rows = flat(load(shards, steps=25))  # 300 rows: six epochs of 50
    for epoch in range(6):
        assert sorted(number for _, number, _, _ in rows[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert all(key == f"{number // 20}/{number % 20:03}" for key, number, _, _ in rows)
    assert [position for *_, position in rows] == list(range(300))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (1, 4), (2, 6), (2, 3), (3, 4), (4, 3), (4, 1)])
def test_any_ranks_and_micro_batches_divide_the_same_global_batches(shards: Path, ranks: int, micro: int) -> None:
    wanted = flat(load(shards))
    loaders = [load(shards, World(rank, ranks), micro) for rank in range(ranks)]
    steps = list(zip(*loaders, strict=True))
    assert flat(itertools.chain.from_iterable(steps)) == wanted
    assert all(len(batches) == GLOBAL_BATCH // ranks // micro for step in steps for batches in step)


def test_a_restart_at_any_step_continues_the_stream(shards: Path) -> None:
    wanted = flat(load(shards))
    for start in range(11):
        assert flat(load(shards, start=start)) == wanted[GLOBAL_BATCH * start :]
    assert flat(load(shards).from_step(7)) == wanted[GLOBAL_BATCH * 7 :]


def test_a_step_far_out_is_found_at_once(shards: Path) -> None:
    step = 10**9 // GLOBAL_BATCH
    rows = flat(load(shards, start=step, steps=step + 1))
    assert [position for *_, position in rows] == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))


def test_rows_carry_their_draw_and_presence(shards: Path) -> None:
    (batch,) = next(iter(load(shards, start=2)))
    assert batch.tensors["draw"].tolist() == [row_key(3, position) for position in range(24, 36)]
    assert batch.tensors["number.present"].tolist() == [True] * 12


def test_a_codec_that_can_do_without_tells_which_rows_it_has(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with webdataset.TarWriter(str(tmp_path / "s" / "0.tar")) as writer:
        for number in range(6):
            label = {"json": {"label": number % 3}} if number % 2 else {}
            writer.write({"__key__": f"{number:03}", "txt": str(number).encode()} | label)
    label = LabelCodecConfig(missing="weightless").codec({"label": FieldSpec((), "int64", below=3)}, None)
    config = DataConfig(train=MixtureConfig(sources={"main": SourceConfig(shards=(str(tmp_path / "s"),))}), workers=0)
    codecs = {"label": label, "number": NumberCodec()}
    ((batch,),) = build_loader(config, codecs, BatchPlan(12, 12, World()), 3, 0, 1)
    numbers = batch.tensors["number"][:, 0]
    assert torch.equal(batch.tensors["label.present"], numbers % 2 == 1)
    assert torch.equal(batch.tensors["label"], torch.where(numbers % 2 == 1, numbers % 3, 0))
    assert batch.tensors["number.present"].all()
    same = batch.tensors["sample"][:, None] == batch.tensors["sample"]
    assert torch.equal(same, numbers[:, None] == numbers)
    (evaluated,) = iterate_all({"main": [str(tmp_path / "s")]}, codecs, 100, World())
    assert evaluated.tensors["label.present"].tolist() == [False, True] * 3


def test_augmentation_depends_on_the_position_and_the_modality_alone(shards: Path) -> None:
    plan = BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH, World())
    config = DataConfig(train=MixtureConfig(sources={"main": SourceConfig(shards=(str(shards),))}), workers=0)
    both = {"other": NumberCodec("other"), "number": NumberCodec()}
    (alone,), (beside,) = next(iter(load(shards))), next(iter(build_loader(config, both, plan, 3, 0, 1)))
    assert torch.equal(alone.tensors["number"], beside.tensors["number"])
    assert not torch.equal(beside.tensors["number"], beside.tensors["other"])


def test_sources_keep_their_own_order_whatever_they_are_mixed_with(tmp_path: Path, shards: Path) -> None:
    write_shard(tmp_path / "more" / "0.tar", range(100, 130))
    alone, mixed = flat(load(shards, steps=20)), flat(load({"main": shards, "more": tmp_path / "more"}, steps=20))
    from_main = [number for _, number, *_ in mixed if number < 100]
    assert len(from_main) == 120
    assert from_main == [number for _, number, *_ in alone[:120]]
    assert {key.split("/")[0] for key, number, *_ in mixed if number % 100 < 20} == {"shards", "more"}


def test_weights_change_at_their_position(tmp_path: Path, shards: Path) -> None:
    write_shard(tmp_path / "more" / "a.tar", range(100, 130))
    sources = {"main": SourceConfig(shards=(str(shards),)), "more": SourceConfig(shards=(str(tmp_path / "more"),))}
    train = MixtureConfig(sources=sources, changes=(WeightChange(from_sample=30, weights={"more": 1.0}),))
    loader = load(shards, train=train)
    numbers = [number for _, number, *_ in flat(loader)]
    assert [number >= 100 for number in numbers] == [False, True] * 15 + [True] * 90


def damage(shards: Path, bad: set[int]) -> Path:
    damaged = shards.parent / "damaged"
    for number, start in enumerate((0, 20, 40)):
        values = ("rubbish" if value in bad else value for value in range(start, min(start + 20, 50)))
        write_shard(damaged / f"{number}.tar", values)
    return damaged


def test_a_bad_sample_is_replaced_and_no_other_row_changes(shards: Path) -> None:
    damaged = damage(shards, {7, 33})
    wanted, steps = flat(load(shards)), list(load(damaged))
    seen = flat(steps)
    changed = [position for position, pair in enumerate(zip(wanted, seen, strict=True)) if pair[0] != pair[1]]
    assert changed == [position for *rest, position in wanted if rest[1] in (7, 33)]
    skips = [skip for step in steps for batch in step for skip in batch.skips]
    assert {skip.position for skip in skips} == set(changed)
    assert {(skip.source, Path(skip.shard).name, skip.ordinal, skip.key) for skip in skips} == {
        ("main", "0.tar", 7, "007"),
        ("main", "1.tar", 13, "013"),
    }
    assert skips[0].reason == "b'rubbish' is no number"
    assert flat(load(damaged)) == seen


def test_a_source_of_bad_samples_alone_stops_the_run(shards: Path) -> None:
    with pytest.raises(
        DataError, match=r"source main: 32 samples drawn for one row cannot be used; the last is .* no num"
    ):
        next(iter(load(damage(shards, set(range(50))))))


def test_a_shard_that_was_cut_since_is_named(shards: Path) -> None:
    loader = load(shards)
    stream = iter(loader)
    next(stream)
    for shard in shards.glob("*.tar"):
        os.truncate(shard, 512)
    with pytest.raises(DataError, match=re.escape(str(shards)) + r"/\d.tar: sample '\d+' should hold .* was cut off"):
        list(stream)


def test_checksums_catch_bytes_that_changed_in_place(shards: Path) -> None:
    loader = load(shards, verify_checksums=True)
    stream = iter(loader)
    next(stream)
    with tarfile.open(shards / "0.tar") as archive:
        offset = archive.getmember("000.txt").offset_data
    with (shards / "0.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"9")
    skips = [skip for step in stream for batch in step for skip in batch.skips]
    assert {(skip.key, skip.reason) for skip in skips} == {
        ("000", "its bytes differ from the checksum in the shard's index")
    }


def test_a_tar_without_pairs_is_refused_at_the_start(tmp_path: Path, shards: Path) -> None:
    write_shard(tmp_path / "other" / "0.tar", range(5), extension="json")
    with pytest.raises(DataError, match="no shard holds number"):
        load(tmp_path / "other")
    with pytest.raises(DataError, match="tar without pairs"):
        load({"main": shards, "other": tmp_path / "other"})


def test_a_missing_shard_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing there; check the path"):
        load(tmp_path / "absent")


def test_shards_of_one_name_keep_their_samples_apart(tmp_path: Path) -> None:
    for folder in ("a/x", "b/x", "b/y"):
        write_shard(tmp_path / folder / "0.tar", [1])
    write_shard(tmp_path / "a" / "x" / "1.tar", [1])
    (source,) = open_sources({"main": [str(tmp_path / folder) for folder in ("a/x", "b/x", "b/y")]})
    assert source.names == ("a/x/0", "1", "b/x/0", "y/0")
    assert source.num_samples == 4


def test_shards_that_are_links_are_named_by_where_the_links_stand(tmp_path: Path) -> None:
    """As in the hub's cache: snapshots/REVISION/a/0.tar leads to blobs/CHECKSUM."""
    for folder, number in (("a", 1), ("b", 2)):
        write_shard(tmp_path / "blobs" / f"{number:032}", [number])
        (tmp_path / "snapshots" / folder).mkdir(parents=True)
        (tmp_path / "snapshots" / folder / "0.tar").symlink_to(f"../../blobs/{number:032}")
    (tmp_path / "main").symlink_to("snapshots")
    (source,) = open_sources({"main": [str(tmp_path / "snapshots/a"), str(tmp_path / "main/b")]})
    assert source.names == ("a/0", "b/0")
    with pytest.raises(DataError, match=r"main/a/0\.tar is named twice"):
        open_sources({"main": [str(tmp_path / "snapshots/a"), str(tmp_path / "main/a")]})
    (tmp_path / "main/a/1.tar").symlink_to("../b/0.tar")
    with pytest.raises(DataError, match=r"main/b/0\.tar is named twice"):
        open_sources({"main": [str(tmp_path / "snapshots/a"), str(tmp_path / "main/b")]})


def test_the_fingerprint_tells_another_order(tmp_path: Path, shards: Path) -> None:
    first = load(shards).fingerprint
    assert load(shards, World(1, 2), micro=3, start=4, steps=99).fingerprint == first
    assert load(shards, seed=4).fingerprint != first
    write_shard(shards / "3.tar", [1])
    assert load(shards).fingerprint != first


def test_more_shards_than_may_be_open_at_once_are_read(tmp_path: Path) -> None:
    for number in range(6):
        write_shard(tmp_path / f"{number}.tar", [number])
    reader = SampleReader(open_sources({"main": [str(tmp_path)]}), max_open_shards=2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [reader.find(0, sample).read().members["txt"] for sample in (0, 1, 2, 3, 4, 5, 0)] == [
        b"0", b"1", b"2", b"3", b"4", b"5", b"0",
    ]  # fmt: skip
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2 * 2  # a shard and its mapped index


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_sees_every_sample_once_in_order_and_without_augmentation(shards: Path, ranks: int) -> None:
    patterns, codecs = {"main": [str(shards)]}, {"number": NumberCodec()}
    parts = [list(iterate_all(patterns, codecs, 4, World(rank, ranks))) for rank in range(ranks)]
    rows = [row for part in parts for batch in part for row in batch.tensors["number"].tolist()]
    assert rows == [[number, -1] for number in range(50)]
    sizes = [sum(len(batch.keys) for batch in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert parts[-1][-1].members[-1] == {"txt": b"49"} and parts[-1][-1].keys[-1] == "2/009"


def test_evaluation_leaves_out_bad_samples_and_says_so(shards: Path) -> None:
    (batch,) = iterate_all({"main": [str(damage(shards, {1}))]}, {"number": NumberCodec()}, 100, World(), max_samples=4)
    assert batch.tensors["number"][:, 0].tolist() == [0, 2, 3] and batch.keys == ("0/000", "0/002", "0/003")
    assert [(skip.key, skip.position) for skip in batch.skips] == [("001", 1)]


def skip(position: int, shard: str = "0.tar", reason: str = "it is cut off") -> Skip:
    return Skip("main", shard, position, f"k{position}", position, reason)


def test_a_ledger_keeps_each_skip_once_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, 1.0).add([skip(1), skip(2)])
    with path.open("a") as file:
        file.write('{"source": "ma')  # killed while it wrote
    again = Ledger(path, 1.0)
    again.add([skip(2), skip(3), skip(3)])
    assert again.skips == tuple(read_ledger(path)) == (skip(1), skip(2), skip(3))
    assert json.loads(path.read_text().splitlines()[2]) == {
        "source": "main",
        "shard": "0.tar",
        "ordinal": 3,
        "key": "k3",
        "position": 3,
        "reason": "it is cut off",
        "repeat": 0,
    }


def test_one_rank_writes_and_all_ranks_stop(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    other = Ledger(path, 0.0, writes=False)
    other.add([skip(1)])
    assert not path.exists()
    with pytest.raises(DataError, match="1 unusable samples after 64"):
        other.check(64)


def test_past_the_budget_the_worst_shards_are_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", budget=0.003)
    ledger.add([skip(1, "a.tar"), skip(2, "b.tar"), skip(3, "b.tar", "no caption")])
    ledger.check(100)  # three of at least a thousand
    ledger.add([skip(4, "b.tar", "no caption")])
    with pytest.raises(
        DataError,
        match=r"4 unusable samples after 1200, more than data.bad_sample_budget 0.003 of 1200: "
        r"b.tar \(3; k4: no caption\); a.tar \(1; k1: it is cut off\)",
    ):
        ledger.check(1200)


def test_shards_of_other_writers_are_read(tmp_path: Path) -> None:
    """img2dataset writes folders, GNU tar and pax headers come from elsewhere."""
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as archive:
            for sample in range(4):
                for extension, content in (("jpg", b"x"), ("txt", str(sample).encode()), ("json", b"{}")):
                    member = tarfile.TarInfo(f"part/{'n' * 60}/{sample}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    rows = flat(load(tmp_path, steps=1))
    assert sorted(number for _, number, *_ in rows) == sorted([0, 1, 2, 3] * 3)
