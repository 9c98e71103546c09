"""Retrieval in both directions between pairs of modalities, over all ranks.

Enter: samples that hold both modalities of a pair; of a text all captions count, of anything else a sample has one.
Leave: recall at 1, 5 and 10, median and mean rank, and the recall of chance, per direction ("i2t": from an image its
captions; "t2i"); beside them `evaluation/retrieval-samples.json` with the best pictures of a few captions and their
thumbnails. Rows that lack either modality of a pair are left out of it. Refused: a named pair that no sample holds.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import all_reduce_sum, gather_objects
from mmpretrain.core.errors import DataError
from mmpretrain.core.figure_names import way_of
from mmpretrain.evaluation.base import EvaluationContext
from mmpretrain.evaluation.lockstep import first_index
from mmpretrain.evaluation.pairs import Pair, PairsTaskConfig
from mmpretrain.evaluation.ranking import RECALL_AT, Embedded, chance_recall, query_ranks, recall_figures
from mmpretrain.evaluation.retrieval_items import Encoded, Items, Wanted, encode, is_pictured
from mmpretrain.evaluation.retrieval_samples import Found, write_samples


class RetrievalConfig(PairsTaskConfig):
    """Retrieval between modalities."""

    kind: Literal["retrieval"] = "retrieval"
    group_by: str | None = None
    """Key of the samples' .json member: samples with equal values are right answers for each other. null: each
    sample is its own."""
    text_batch: int = 256
    """Captions per call of the text tower."""
    samples: int = 8
    """Captions whose best pictures are written out to look at, of the first pair of pictures and text; 0: none."""

    def run(self, context: EvaluationContext) -> dict[str, float]:
        pairs = self.chosen(context.model.facts.towers)
        shown = self._shown(context, pairs)
        modalities = tuple(dict.fromkeys(modality for pair in pairs for modality in pair))
        encoded = encode(context, self, Wanted(modalities, self.group_by, self.text_batch, shown and shown[0]))
        ids = _row_ids(encoded, self.group_by is not None, context.device)
        figures: dict[str, float] = {}
        for pair in pairs:
            first, second = _both(encoded.items[pair[0]], encoded.items[pair[1]])
            if _some(first, pair, self.pairs == "all"):
                figures |= _figures(pair, _embedded(first, ids), _embedded(second, ids))
        if not figures:
            raise DataError(f"retrieval saw no sample with two of {', '.join(modalities)}; check its shards")
        if shown is not None and context.run_dir is not None:
            pictures, captions = (encoded.items[modality] for modality in shown)
            kept = _both(pictures, captions)
            found = _found(encoded, shown, *kept)
            media, texts = (_embedded(items, ids) for items in kept)
            strips = write_samples(context.run_dir, found, media, texts, self.samples)
            context.pictures[f"{self.prefix}/retrieved"] = strips
        return self.named(figures)

    def _shown(self, context: EvaluationContext, pairs: list[Pair]) -> Pair | None:
        """(pictures, text) of the first pair that has them, where samples are wanted."""
        for pair in pairs if self.samples and context.run_dir is not None else ():
            for pictures, text in (pair, pair[::-1]):
                if is_pictured(context.codecs[pictures].fields[pictures]) and context.has_captions(text):
                    return pictures, text
        return None


def _both(first: Items, second: Items) -> tuple[Items, Items]:
    """The items whose sample has the other modality too."""
    return first.where(torch.isin(first.rows, second.rows)), second.where(torch.isin(second.rows, first.rows))


def _some(items: Items, pair: Pair, may_lack: bool) -> bool:
    """Whether any rank has such samples. Communicates."""
    if int(all_reduce_sum(torch.tensor(len(items.rows), device=items.rows.device))):
        return True
    if may_lack:
        return False
    raise DataError(f"retrieval saw no sample that holds both {pair[0]} and {pair[1]}; check its shards or its pairs")


def _row_ids(encoded: Encoded, grouped: bool, device: torch.device) -> Tensor:
    """Ids of this rank's rows: their global index, or the index of their group. Communicates."""
    first = first_index(len(encoded.keys))
    if not grouped:
        return torch.arange(first, first + len(encoded.keys), device=device)
    index = {name: number for number, name in enumerate(sorted(set().union(*gather_objects(set(encoded.groups)))))}
    return torch.tensor([index[name] for name in encoded.groups], dtype=torch.int64, device=device)


def _embedded(items: Items, ids: Tensor) -> Embedded:
    return Embedded(items.vectors, ids[items.rows])


def _figures(pair: Pair, first: Embedded, second: Embedded) -> Mapping[str, float]:
    figures: dict[str, float] = {}
    for (query, gallery), queries, others in ((pair, first, second), (pair[::-1], second, first)):
        way = way_of(query, gallery)
        figures |= {f"{way}_{key}": value for key, value in recall_figures(query_ranks(queries, others)).items()}
        figures |= {f"{way}_chance_r@{k}": chance_recall(queries, others, k) for k in RECALL_AT}
    return figures


def _found(encoded: Encoded, shown: Pair, pictures: Items, captions: Items) -> Found:
    """What the samples show of the items, which are among those that were encoded."""
    place = {row: number for number, row in enumerate(pictures.rows.tolist())}
    return Found(
        keys=[encoded.keys[row] for row in place],
        captions=[encoded.captions[shown[1]][number] for number in captions.numbers.tolist()],
        owners=[place[row] for row in captions.rows.tolist()],
        thumbnails=[encoded.thumbnails[number] for number in pictures.numbers.tolist()],
    )
