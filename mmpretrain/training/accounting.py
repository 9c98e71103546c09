"""`data ledger`: what became of every sample of a run, and the proof that none was lost or repeated.

Enter: a run folder, of a run that ended, was killed, or goes on. Leave: an `Account` and its table. Refused: a folder
without the record of what steps consumed, and, as a DataError, a run that lost or repeated samples.
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.account import Account, Consumed, Epoch, faults_of, take_account
from data_pipeline.ledger import read_ledger
from data_pipeline.reader import open_sources
from data_pipeline.sample_order import order_of
from mmpretrain.config import RunConfig
from mmpretrain.core import run_files
from mmpretrain.core.config import load_config
from mmpretrain.core.errors import DataError
from mmpretrain.training.spikes import read_rollbacks


def prove(run: Path) -> Account:
    """Show the account of a run; DataError names what is lost or repeated."""
    account = account_of(run)
    _show(account)
    faults = faults_of(account)
    if faults:
        raise DataError(f"{run}: {len(faults)} faults:\n  " + "\n  ".join(faults))
    return account


def account_of(run: Path) -> Account:
    """From the run's config, the indexes of its shards and its records; no sample is read."""
    config_file, record = run / "config.yaml", run / run_files.CONSUMED
    if not config_file.is_file() or not record.is_file():
        raise DataError(
            f"{run} holds no config.yaml and {run_files.CONSUMED}; name the folder of a run that has done a step"
        )
    config = load_config(RunConfig, config_file)
    train = config.data.train
    sources = open_sources({name: source.shards for name, source in train.sources.items()}, cache=config.data.cache)
    return take_account(
        order_of(train, sources, config.seed, config.global_batch_size),
        config.global_batch_size,
        _read_consumed(record, config.steps),
        read_ledger(run / run_files.LEDGER),
        [one.gap for one in read_rollbacks(run)],
    )


def _read_consumed(record: Path, last: int) -> list[Consumed]:
    """Without a last line that a kill cut off; `last`: the run's last step, which may since have been lowered."""
    try:
        consumed = [Consumed(int(row["step"]), int(row["digest"], 16)) for row in run_files.whole_rows(record)]
        possible = max(last, len(consumed))
        beyond = next((one.step for one in consumed if not 0 < one.step <= possible), None)
        if beyond is not None:
            raise ValueError(f"step {beyond} is none of the {possible} of the run")
        return consumed
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record} is damaged ({error}); what its run consumed cannot be proven") from error


def _show(account: Account) -> None:
    table = Table("set", "epoch", "samples", "seen", "skipped", "to come", "lost", "repeated")
    for epochs in _alike(account.epochs):
        first, last = epochs[0], epochs[-1]
        number = str(first.number) if first is last else f"{first.number} to {last.number}"
        figures = (first.samples, first.seen, first.skipped, first.to_come)
        table.add_row(first.source, number, *(f"{figure:,}" for figure in figures), *map(str, _wrong(first)))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for reason, count in sorted(account.reasons.items()):
        console.print(f"skipped {count:,}: {reason}", markup=False)
    console.print(f"{account.steps:,} steps consumed {account.samples:,} samples")


def _alike(epochs: Iterable[Epoch]) -> list[list[Epoch]]:
    """Neighbouring epochs of a set that differ in their number alone."""
    return [list(group) for _, group in groupby(epochs, lambda one: (one.source, one.seen, one.skipped, *_wrong(one)))]


def _wrong(epoch: Epoch) -> tuple[int, int]:
    lost, repeated = (sum(one.last - one.first + 1 for one in ranges) for ranges in (epoch.lost, epoch.repeated))
    return lost, repeated
