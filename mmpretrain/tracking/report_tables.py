"""Figures of the last evaluation side by side: one table per task and family of figures.

Enter: figures by name. Leave: tables whose rows are what was measured (a direction, a modality, an objective) and whose
columns are how. Figures of no family are in no table here; the page lists every figure beside them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mmpretrain.core.figure_names import modalities_of

WAY = r"[a-z]\w*?2[a-z]\w*?(?<!_chance)"
"""The short name of a direction of retrieval, `core.figure_names.way_of`."""


@dataclass
class Table:
    """Values by row, then by column; both in the order in which figures came, what guessing scores last."""

    title: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    """Of the figures in it, as they came."""

    @property
    def columns(self) -> list[str]:
        names = dict.fromkeys(column for row in self.rows.values() for column in row)
        return sorted(names, key=lambda name: name.startswith(("chance", "guess")))


@dataclass(frozen=True)
class _Family:
    """Figures that belong in one table; the pattern's groups name the row, and the column where it is not `whole`."""

    title: str
    pattern: re.Pattern[str]
    label: Callable[[str], str]
    whole: str = ""

    def place(self, name: str) -> tuple[str, str] | None:
        """Row and column of a figure, None where it is of another family."""
        match = self.pattern.fullmatch(name)
        return match and (self.label(match["row"]), _column(match["column"] or self.whole))


def way_label(way: str) -> str:
    """ "i2t" in words."""
    return " → ".join(modalities_of(way))


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _dotted(pair: str) -> str:
    return pair.replace("_", " · ")


def _column(name: str) -> str:
    return _spaced(re.sub(r"\br@", "R@", name.replace("chance_r@", "chance r@").replace("no_", "without ")))


_FAMILIES = (
    _Family(
        "Retrieval",
        re.compile(rf"(?P<row>{WAY})_(?P<column>r@\d+|chance_r@1|median_rank|mean_rank)"),
        way_label,
    ),
    _Family(
        "Classification",
        re.compile(r"(?P<row>zeroshot|(?:probe|knn)_\w+?)_(?P<column>top\d+|mean_class|chance)"),
        _spaced,
    ),
    _Family(
        "What each modality is worth",
        re.compile(r"(?P<row>\w+?_(?:acc|mae)|loss_\w+?)(?:_(?P<column>guess|(?:no|shuffled)(?:_\w+)?))?"),
        _spaced,
        "whole",
    ),
    _Family("Embeddings", re.compile(r"(?P<column>uniformity|effective_rank|std)_(?P<row>\w+)"), _spaced),
    _Family("Pairs of embeddings", re.compile(r"(?P<column>alignment|modality_gap)_(?P<row>\w+)"), _dotted),
)


def tables_of(figures: Mapping[str, float]) -> list[Table]:
    """The tables of "<task>/<figure>" names, by family and then by task."""
    tables: dict[tuple[int, str], Table] = {}
    for name, value in figures.items():
        task, _, figure = name.rpartition("/")
        for number, family in enumerate(_FAMILIES):
            place = family.place(figure)
            if place is not None:
                title = family.title if task == "val" else f"{family.title}: {task}"
                table = tables.setdefault((number, task), Table(title))
                table.rows.setdefault(place[0], {})[place[1]] = value
                table.names.append(name)
                break
    return [tables[key] for key in sorted(tables, key=lambda key: (key[0], key[1] != "val", key[1]))]
