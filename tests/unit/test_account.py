"""What became of every sample: proven from digests of what loaders really gave, by whatever ranks and attempts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import pytest
from test_loader import NumberCodec, write_shard

from data_pipeline.account import Account, Consumed, Epoch, Range, faults_of, take_account
from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig, WeightChange
from data_pipeline.digest import halves, joined, of_halves
from data_pipeline.ledger import Ledger, read_ledger
from data_pipeline.loader import Loader, build_loader
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import Batch, Skip

GLOBAL_BATCH, STEPS = 12, 30


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """40 numbers in two shards, 30 in one, of which 105 and 117 are none."""
    write_shard(tmp_path / "few" / "0.tar", range(25))
    write_shard(tmp_path / "few" / "1.tar", range(25, 40))
    write_shard(tmp_path / "bad" / "a.tar", ("rubbish" if n in (105, 117) else n for n in range(100, 130)))
    return tmp_path


def load(sets: Path, world: World = World(), start: int = 0, micro: int = 3) -> Loader:  # noqa: B008 - frozen
    sources = {name: SourceConfig(shards=(str(sets / name),)) for name in ("few", "bad")}
    changes = (WeightChange(from_sample=100, weights={"few": 3.0, "bad": 1.0}),)
    config = DataConfig(train=MixtureConfig(sources=sources, changes=changes), workers=0)
    return build_loader(config, {"number": NumberCodec()}, BatchPlan(GLOBAL_BATCH, micro, world), 3, start, STEPS)


def consume(steps: Iterable[Sequence[Batch]], first: int = 1) -> tuple[list[Consumed], list[Skip], list[list[str]]]:
    """What a rank gives: digests, skips and keys by step."""
    done, skips, keys = [], [], []
    for number, batches in enumerate(steps, first):
        done.append(Consumed(number, joined(batch.digest for batch in batches)))
        skips += [skip for batch in batches for skip in batch.skips]
        keys.append([key for batch in batches for key in batch.keys])
    return done, skips, keys


def account(loader: Loader, consumed: Sequence[Consumed], skips: Iterable[Skip], **more: object) -> Account:
    return take_account(loader.order, GLOBAL_BATCH, consumed, skips, **more)  # type: ignore[arg-type]


def test_every_sample_is_accounted_for_in_every_epoch(sets: Path) -> None:
    loader = load(sets)
    consumed, skips, keys = consume(loader)
    found = account(loader, consumed, skips)
    assert faults_of(found) == [] and (found.steps, found.samples) == (30, 360)
    read = Counter(key for step in keys for key in step)
    assert sum(read.values()) == 360 and not {"a/005", "a/017"} & read.keys()
    # 50 of each before the change, then 195 and 65: few is read 6.1 times, bad 3.8 times
    assert [epoch.number for epoch in found.epochs] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    for epoch in found.epochs:
        assert epoch.seen + epoch.skipped + epoch.to_come == epoch.samples
    assert found.epochs[0] == Epoch("few", 0, 40, 40, 0, 0, (), ())
    assert found.epochs[6] == Epoch("few", 6, 40, 5, 0, 35, (), ())
    assert found.epochs[7] == Epoch("bad", 0, 30, 28, 2, 0, (), ())
    assert found.reasons == {"b'rubbish' is no number": sum(epoch.skipped for epoch in found.epochs)}
    assert loader.order.epochs(360) == {"few": 245 / 40, "bad": 115 / 30}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_digests_of_ranks_add_up_to_that_of_one(sets: Path, ranks: int) -> None:
    wanted, skips, _ = consume(load(sets))
    parts = [consume(load(sets, World(rank, ranks))) for rank in range(ranks)]
    summed = [
        Consumed(rows[0].step, joined(row.digest for row in rows)) for rows in zip(*(p[0] for p in parts), strict=True)
    ]
    assert summed == wanted
    assert sorted(skip.position for part in parts for skip in part[1]) == sorted(skip.position for skip in skips)
    added = [sum(column) for column in zip(*(halves(part[0][0].digest) for part in parts), strict=True)]
    assert of_halves(*map(float, added)) == wanted[0].digest


def test_a_step_that_was_never_done_loses_its_samples(sets: Path) -> None:
    loader = load(sets)
    consumed, skips, keys = consume(loader)
    found = account(loader, consumed[:4] + consumed[5:], skips)
    assert found.missing == (5,) and not found.differing
    lost = [one for epoch in found.epochs for one in epoch.lost]
    named = {f"{Path(one.shard).stem}/{n:03}" for one in lost for n in range(one.first, one.last + 1)}
    replaced = {f"{Path(skip.shard).stem}/{skip.ordinal:03}" for skip in skips if 48 <= skip.position < 60}
    assert named >= replaced and len(named) == GLOBAL_BATCH
    assert len(set(keys[4]) - named) == len(replaced)
    ((first, *_),) = [faults_of(found)]
    assert first == "steps 5 left no word of what they consumed"


def test_a_step_done_twice_repeats_its_samples(sets: Path) -> None:
    loader = load(sets)
    consumed, skips, _ = consume(loader)
    found = account(loader, [*consumed[:3], consumed[2], *consumed[3:]], skips)
    assert found.doubled == (3,)
    assert sum(one.last - one.first + 1 for epoch in found.epochs for one in epoch.repeated) == GLOBAL_BATCH
    assert "set few, epoch 0: 6 samples repeated: " in "\n".join(faults_of(found))


def test_a_rank_that_read_something_else_is_found(sets: Path) -> None:
    loader = load(sets)
    consumed, skips, _ = consume(loader)
    other = Consumed(7, consumed[7].digest)  # what step 8 read
    found = account(loader, [*consumed[:6], other, *consumed[7:]], skips)
    assert found.differing == (7,)
    assert faults_of(found)[0] == "steps 7 consumed something else than the order of samples says"
    without = account(loader, consumed, skips[1:])
    assert without.differing == (skips[0].position // GLOBAL_BATCH + 1,)


def test_an_attempt_that_was_killed_is_taken_up_at_other_ranks(sets: Path) -> None:
    loader = load(sets)
    consumed, skips, _ = consume(loader)
    resumed = [consume(load(sets, World(rank, 3), start=11, micro=2), first=12) for rank in range(3)]
    later = [
        Consumed(rows[0].step, joined(row.digest for row in rows))
        for rows in zip(*(r[0] for r in resumed), strict=True)
    ]
    found = account(loader, consumed[:11] + later, skips)
    assert faults_of(found) == [] and found == account(loader, consumed, skips)


def test_a_row_that_draws_the_same_unusable_sample_again_is_accounted_for_by_its_ledger(tmp_path: Path) -> None:
    write_shard(tmp_path / "few" / "0.tar", ("rubbish" if n in (1, 2) else n for n in range(4)))
    write_shard(tmp_path / "bad" / "a.tar", range(4))
    loader = load(tmp_path)
    consumed, skips, _ = consume(islice(loader, 10))
    assert len({(skip.position, skip.ordinal) for skip in skips}) < len(skips)
    path = tmp_path / "ledger.jsonl"
    Ledger(path, 1.0).add(skips)
    Ledger(path, 1.0).add(skips[-20:])  # steps that are replayed
    assert read_ledger(path) == skips
    assert faults_of(account(loader, consumed, read_ledger(path))) == []


def test_data_that_was_passed_over_is_skipped_with_its_reason(sets: Path) -> None:
    loader = load(sets)
    gaps = ((4, 2), (4, 1), (9, 3))  # back from step 6 to 4, again from 5 to 4, then from 12 to 9
    consumed, skips, _ = consume(loader.from_step(0, gaps))
    found = account(loader, consumed, skips, passed_over=gaps)
    assert faults_of(found) == []
    assert found.reasons["passed over, because the loss rose there"] == 6 * GLOBAL_BATCH
    assert sum(epoch.seen for epoch in found.epochs) == 360 - (sum(found.reasons.values()) - 72)
    assert account(loader, consumed, skips).differing == tuple(range(5, 31))


def test_neighbours_are_named_as_ranges(sets: Path) -> None:
    loader = load(sets)
    found = account(loader, [Consumed(30, 0)], [])
    assert found.missing == tuple(range(1, 30)) and found.differing == (30,)
    shards = [str(sets / "few" / name) for name in ("0.tar", "1.tar")]
    assert found.epochs[0].lost == (Range(shards[0], 0, 24), Range(shards[1], 0, 14))
    assert str(found.epochs[0].lost[1]) == f"{shards[1]} 0 to 14"
    assert faults_of(found)[0] == "steps 1, 2, 3, 4, 5 and 24 more left no word of what they consumed"
