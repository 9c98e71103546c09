"""Texts of like length in one batch: each sample once an epoch, by arithmetic alone, whoever reads it from where."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from test_loader import NumberCodec, flat, write_shard

from data_pipeline.account import Consumed, faults_of, take_account
from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig, WeightChange
from data_pipeline.digest import joined
from data_pipeline.loader import Loader, build_loader
from data_pipeline.sample_order import SampleOrder
from mmpretrain.core.ranks import BatchPlan, World

GLOBAL_BATCH, BATCHES, STEPS = 8, 5, 40
FEW, MANY = 30, 70


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 numbers and 70 numbers in two shards, written with 3 to 60 digits, most of them zeros."""
    folder, chance = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)

    def digits(numbers: Iterable[int]) -> list[str]:
        return [f"{number:0{chance.integers(3, 61)}}" for number in numbers]

    write_shard(folder / "few" / "0.tar", digits(range(FEW)))
    write_shard(folder / "many" / "1.tar", digits(range(100, 150)))
    write_shard(folder / "many" / "2.tar", digits(range(150, 100 + MANY)))
    return folder


def load(
    sets: Path,
    names: tuple[str, ...] = ("few", "many"),
    world: World = World(),  # noqa: B008 - frozen
    micro: int | None = None,
    start: int = 0,
    batches: int = BATCHES,
) -> Loader:
    sources = {name: SourceConfig(shards=(str(sets / name),)) for name in names}
    changes = (WeightChange(from_sample=50, weights={"few": 1.0, "many": 3.0}),) if len(names) > 1 else ()
    train = MixtureConfig(sources=sources, changes=changes, batches_by_length=batches)
    plan = BatchPlan(GLOBAL_BATCH, micro or GLOBAL_BATCH // world.size, world)
    return build_loader(DataConfig(train=train, workers=0), {"number": NumberCodec()}, plan, 3, start, STEPS)


def lengths_of(order: SampleOrder) -> list[list[int]]:
    """Characters of each sample of each source, from the shards themselves."""
    return [
        [
            len(sample["txt"])
            for shard in source.shards
            for sample in webdataset.WebDataset(str(shard), shardshuffle=False)
        ]
        for source in order.sources
    ]


def test_the_order_is_that_of_plain_sorting(sets: Path) -> None:
    grouped, drawn = load(sets).order, load(sets, batches=1).order
    lengths, found = lengths_of(drawn), rows_of(grouped)
    size = GLOBAL_BATCH * BATCHES
    for first in range(0, GLOBAL_BATCH * STEPS, size):
        before, after = rows_of(drawn)[first : first + size], found[first : first + size]
        pieces: dict[tuple[int, int], list[int]] = {}
        for place, (source, draw, _) in enumerate(before):
            pieces.setdefault((source, draw // drawn.sources[source].num_samples), []).append(place)
        for (source, _), places in pieces.items():
            wanted = sorted((lengths[source][before[place][2]], before[place][1]) for place in places)
            batches = {place // GLOBAL_BATCH for place in places}
            runs = [[after[place][1] for place in places if place // GLOBAL_BATCH == batch] for batch in batches]
            by_length = sorted(runs, key=lambda run: [draw for _, draw in wanted].index(run[0]))
            assert [draw for run in by_length for draw in run] == [draw for _, draw in wanted]


def rows_of(order: SampleOrder) -> list[tuple[int, int, int]]:
    """(source, draw, sample) at each position."""
    sources, draws = order.assign(np.arange(GLOBAL_BATCH * STEPS))
    return list(zip(sources.tolist(), draws.tolist(), order.samples_of(sources, draws).tolist(), strict=True))


def test_every_epoch_holds_each_sample_once_and_every_position_its_source(sets: Path) -> None:
    grouped, drawn = rows_of(load(sets).order), rows_of(load(sets, batches=1).order)
    assert [source for source, _, _ in grouped] == [source for source, _, _ in drawn]
    assert grouped != drawn
    for source, size in ((0, FEW), (1, MANY)):
        samples = [sample for one, _, sample in grouped if one == source]
        assert len(samples) > 2 * size
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_any_ranks_and_micro_batches_divide_the_same_global_batches(sets: Path, ranks: int, micro: int) -> None:
    whole = flat(load(sets))
    parts = [flat(load(sets, world=World(rank, ranks), micro=micro)) for rank in range(ranks)]
    assert sorted((row for part in parts for row in part), key=lambda row: row[3]) == whole


@pytest.mark.parametrize("start", [1, 4, 5, 23])
def test_a_restart_at_any_step_continues_the_stream(sets: Path, start: int) -> None:
    whole = flat(load(sets))
    assert flat(load(sets, start=start)) == whole[GLOBAL_BATCH * start :]


def test_what_a_worker_is_given_reads_the_same(sets: Path) -> None:
    loader = load(sets)
    copied = pickle.loads(pickle.dumps(loader.order))  # noqa: S301 - our own
    assert rows_of(copied) == rows_of(loader.order)


def test_each_batch_holds_texts_of_like_length_and_none_by_its_place(sets: Path) -> None:
    def batches(of: int) -> np.ndarray:
        order = load(sets, ("many",), batches=of).order
        lengths = np.array(lengths_of(order)[0])
        return lengths[[sample for _, _, sample in rows_of(order)]].reshape(STEPS, GLOBAL_BATCH)

    def padding(of: int) -> float:
        found = batches(of)
        return float(1 - found.sum() / (GLOBAL_BATCH * found.max(axis=1)).sum())

    assert padding(1) > 0.35 and padding(2 * BATCHES) < padding(BATCHES) < 0.2
    shortest = batches(BATCHES).mean(axis=1).reshape(-1, BATCHES).argmin(axis=1)
    assert len(set(shortest.tolist())) > 2


def test_the_ledger_proves_it(sets: Path) -> None:
    loader = load(sets, micro=2)
    consumed = [Consumed(step, joined(batch.digest for batch in batches)) for step, batches in enumerate(loader, 1)]
    assert faults_of(take_account(loader.order, GLOBAL_BATCH, consumed)) == []
    assert faults_of(take_account(load(sets, batches=1).order, GLOBAL_BATCH, consumed))


def test_another_grouping_is_another_run_and_none_is_the_order_as_drawn(sets: Path) -> None:
    prints = {load(sets, batches=batches).fingerprint for batches in (1, BATCHES, 2 * BATCHES)}
    assert len(prints) == 3
    drawn = load(sets, batches=1).order
    assert all(map(np.array_equal, drawn.assign(np.arange(99)), drawn.mixture.assign(np.arange(99))))
