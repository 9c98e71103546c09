"""`data check`: read every byte of every shard, decode every image, and name all that is wrong.

Enter: folders, globs or tars. Leave: a `CheckReport` and a table of it. Refused, by a DataError at the end: damaged or
cut tars, duplicate keys or members in a shard, unsafe members, samples that changed since they were indexed, members
that cannot be decoded. Keys that several shards repeat, and strays, are only noted: a sample is (shard, ordinal).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.index import ShardIndex, build_index, changed_samples, read_index
from data_pipeline.parallel import run_parallel
from data_pipeline.remote import Shard
from data_pipeline.shards import resolve_shards
from data_pipeline.sniff import decode_whole
from data_pipeline.tar import open_shard
from mmpretrain.core.captions import captions_of
from mmpretrain.core.errors import DataError, SampleError
from mmpretrain.core.media_types import IMAGE_EXTENSIONS, MEDIA_EXTENSIONS, sniff

SHOWN = 50
"""Rows of the table; the report holds all."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, with a shard."""

    shard: str
    key: str
    """The sample's key; empty where it concerns the whole shard."""
    what: str
    is_fault: bool = True


@dataclass(frozen=True)
class CheckReport:
    shards: int
    samples: int
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.is_fault)


@dataclass(frozen=True)
class _Checked:
    """What one process found in one shard."""

    shard: Shard
    keys: list[str]
    findings: list[Finding]


def check(patterns: Iterable[str], workers: int | None = None) -> CheckReport:
    """Check all shards and show what was found; any fault is a DataError once everything was read."""
    shards = resolve_shards(patterns)
    checked = run_parallel(check_shard, shards, workers, "checking")
    findings = [finding for one in checked for finding in one.findings] + _repeated_keys(checked)
    report = CheckReport(len(shards), sum(len(one.keys) for one in checked), tuple(findings))
    _show(report)
    if report.faults:
        damaged = sorted({finding.shard for finding in report.faults})
        raise DataError(
            f"{len(report.faults)} faults in {len(damaged)} of {len(shards)} shards: {', '.join(damaged[:5])}"
            f"{', ...' if len(damaged) > 5 else ''}; fetch or make these shards again"
        )
    return report


def check_shard(shard: Shard) -> _Checked:
    """Everything that can be told of one shard by itself."""
    findings: list[Finding] = []

    def report(what: str, key: str = "", is_fault: bool = True) -> None:
        findings.append(Finding(str(shard), key, what.removeprefix(f"{shard}: "), is_fault))

    try:
        index = build_index(shard, report=lambda error: report(str(error)))
    except DataError as error:
        report(str(error))
        return _Checked(shard, [], findings)
    if not index.num_samples:
        report("holds no sample that can be read")
    if index.ignored:
        report(f"{index.ignored} members belong to no sample (hidden, or without an extension)", is_fault=False)
    for what in _uneven(index):
        report(what, is_fault=False)
    for key, what in itertools.chain(_compare_with_saved(index), _undecodable(index)):
        report(what, key)
    return _Checked(shard, index.keys(), findings)


def _compare_with_saved(index: ShardIndex) -> Iterator[tuple[str, str]]:
    """(key, what) for samples whose bytes no longer have the checksum that the saved index holds."""
    try:
        saved = read_index(index.shard)
    except DataError as error:
        yield "", str(error)
        return
    if saved is None:
        return
    if saved.shard_bytes != index.shard_bytes:
        yield "", f"changed since it was indexed: {saved.shard_bytes} bytes then, {index.shard_bytes} now"
        return
    for ordinal in changed_samples(saved):
        yield saved.key(ordinal), "its bytes changed since the shard was indexed"


def _undecodable(index: ShardIndex) -> Iterator[tuple[str, str]]:
    """(key, what) for members that no codec could decode."""
    with open_shard(index.shard) as data:
        for ordinal in range(index.num_samples):
            offset, length = index.sample_range(ordinal)
            members = index.slice_members(ordinal, data[offset : offset + length])
            for what in _faults_of(members):
                yield index.key(ordinal), what


def _faults_of(members: dict[str, bytes]) -> Iterator[str]:
    for extension, content in members.items():
        try:
            if extension in IMAGE_EXTENSIONS:
                decode_whole(content)
            elif extension in MEDIA_EXTENSIONS and sniff(content) not in MEDIA_EXTENSIONS:
                yield f".{extension}: its content is no known media type; it begins with {content[:16]!r}"
        except SampleError as error:
            yield f".{extension}: {error}"
    try:
        captions_of(members)
    except SampleError as error:
        yield str(error)


def _uneven(index: ShardIndex) -> Iterator[str]:
    """Notes on samples that do not pair up."""
    if not index.num_samples:
        return
    kinds = Counter(frozenset(name for name, _, _ in index.members(n)) for n in range(index.num_samples))
    (usual, count), *_ = kinds.most_common(1)
    if len(kinds) > 1:
        yield f"{index.num_samples - count} samples have other members than the usual .{', .'.join(sorted(usual))}"
    if all(len(kind) == 1 for kind in kinds):
        yield "a tar without pairs: every sample has a single member"


def _repeated_keys(checked: Iterable[_Checked]) -> list[Finding]:
    """A note for each shard that shares keys with a shard before it."""
    first_seen: dict[str, Shard] = {}
    notes = []
    for one in checked:
        repeated = [key for key in one.keys if key in first_seen]
        for key in one.keys:
            first_seen.setdefault(key, one.shard)
        if repeated:
            what = f"{len(repeated)} keys also stand in other shards, the first in {first_seen[repeated[0]]}"
            notes.append(Finding(str(one.shard), repeated[0], what, is_fault=False))
    return notes


def _show(report: CheckReport) -> None:
    console = Console()
    if report.findings:
        table = Table("", "shard", "key", "what")
        for finding in sorted(report.findings, key=lambda one: not one.is_fault)[:SHOWN]:
            kind = "fault" if finding.is_fault else "note"
            table.add_row(kind, *(Text(text) for text in (Path(finding.shard).name, finding.key, finding.what)))
        console.print(table)
    hidden = f" ({len(report.findings) - SHOWN} not shown)" if len(report.findings) > SHOWN else ""
    notes = len(report.findings) - len(report.faults)
    console.print(
        f"{report.shards} shards, {report.samples} samples: {len(report.faults)} faults, {notes} notes{hidden}",
        highlight=False,
    )
