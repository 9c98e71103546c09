"""Retrieval in both directions between a modality and its captions, over all ranks.

Enter: samples with one or more captions each. Leave: recall at 1, 5 and 10, median and mean rank, and the recall of
chance, per direction ("i2t": from an image its captions; "t2i"); beside them `evaluation/retrieval-samples.json` with
the best images of a few captions and their thumbnails. Rows that lack the modality are left out; a row without captions
stays in the gallery and asks nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.collectives import gather_objects
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.base import EvaluationContext, Rows, TaskConfig
from mmpretrain.evaluation.labels import json_label
from mmpretrain.evaluation.lockstep import first_index, in_step
from mmpretrain.evaluation.ranking import RECALL_AT, Embedded, chance_recall, query_ranks, recall_figures
from mmpretrain.evaluation.retrieval_samples import Found, thumbnail, write_samples


class RetrievalConfig(TaskConfig):
    """Retrieval between a modality and text."""

    kind: Literal["retrieval"] = "retrieval"
    pair: tuple[str, str] = ("image", "text")
    """The modality, then the text modality whose captions name it."""
    group_by: str | None = None
    """Key of the samples' .json member: samples with equal values are right answers for each other. null: each
    sample is its own."""
    text_batch: int = 256
    """Captions per call of the text tower."""
    samples: int = 8
    """Captions whose best images are written out to look at; 0: none."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.pair

    def run(self, context: EvaluationContext) -> dict[str, float]:
        part = _encode(context, self)
        ids = _group_ids(part.groups, len(part.vectors), context.device)
        media = Embedded(part.vectors, ids)
        captions = Embedded(part.caption_vectors, ids[part.caption_rows])
        asking = torch.tensor(sorted(set(part.owners)), dtype=torch.int64, device=context.device)
        figures = _figures(self.pair, Embedded(media.vectors[asking], ids[asking]), media, captions)
        if self.samples and context.run_dir is not None and self.pair[0] == "image":
            write_samples(context.run_dir, part.found(), media, captions, self.samples)
        return self.named(figures)


@dataclass
class _Part:
    """What this rank encoded; row r of `vectors` has key `keys[r]`, caption c belongs to row `caption_rows[c]`."""

    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    vectors: Tensor = field(default_factory=lambda: torch.zeros(0))
    caption_vectors: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def caption_rows(self) -> Tensor:
        return torch.tensor(self.owners, dtype=torch.int64, device=self.vectors.device)

    def found(self) -> Found:
        return Found(self.keys, self.captions, self.owners, self.thumbnails)


def _encode(context: EvaluationContext, task: RetrievalConfig) -> _Part:
    modality, text = task.pair
    part, vectors = _Part(), [torch.zeros(0, context.model.facts.embed_dim, device=context.device)]
    for rows in context.turns(task):
        fields = context.stand_in(modality) if rows is None else rows.tensors
        embedded = context.embed(modality, fields)
        if rows is not None:
            present = rows.tensors[f"{modality}.present"].nonzero().flatten().tolist()
            vectors.append(embedded[present])
            _note_rows(part, context, task, rows, present)
    part.vectors = torch.cat(vectors)
    part.caption_vectors = embed_texts(context, text, part.captions, task.text_batch)
    return part


def _note_rows(part: _Part, context: EvaluationContext, task: RetrievalConfig, rows: Rows, present: list[int]) -> None:
    modality, text = task.pair
    wants_thumbnails = task.samples and context.run_dir is not None and modality == "image"
    for row in present:
        members = rows.members[row]
        texts = context.text(text).captions(members) if rows.tensors[f"{text}.present"][row] else []
        part.captions += texts
        part.owners += [len(part.keys)] * len(texts)
        part.keys.append(rows.keys[row])
        if task.group_by is not None:
            part.groups.append(json_label(members, task.group_by, rows.keys[row]))
        if wants_thumbnails:
            part.thumbnails.append(thumbnail(rows.tensors[modality][row]))


def embed_texts(context: EvaluationContext, modality: str, texts: list[str], batch: int) -> Tensor:
    """Unit embeddings [n, embed_dim] of this rank's texts. Communicates: ranks call the tower equally often."""
    vectors = [torch.zeros(0, context.model.facts.embed_dim, device=context.device)]
    for fields in in_step(_text_batches(context, modality, texts, batch), context.device):
        embedded = context.embed(modality, context.stand_in(modality) if fields is None else fields)
        if fields is not None:
            vectors.append(embedded)
    return torch.cat(vectors)


def _text_batches(context: EvaluationContext, modality: str, texts: list[str], batch: int) -> Iterator[TensorDict]:
    codec = context.text(modality)
    for start in range(0, len(texts), batch):
        fields = codec.encode(texts[start : start + batch])
        yield {name: torch.from_numpy(array) for name, array in fields.items()}


def _group_ids(groups: list[str], count: int, device: torch.device) -> Tensor:
    """Ids of this rank's rows: their global index, or the index of their group. Communicates."""
    first = first_index(count)
    names = sorted(set().union(*gather_objects(set(groups))))
    if not names:
        return torch.arange(first, first + count, device=device)
    index = {name: number for number, name in enumerate(names)}
    return torch.tensor([index[name] for name in groups], dtype=torch.int64, device=device)


def _figures(pair: tuple[str, str], asking: Embedded, media: Embedded, captions: Embedded) -> Mapping[str, float]:
    there, back = f"{pair[0][0]}2{pair[1][0]}", f"{pair[1][0]}2{pair[0][0]}"
    figures: dict[str, float] = {}
    for name, queries, gallery in ((there, asking, captions), (back, captions, media)):
        found = recall_figures(query_ranks(queries, gallery))
        figures |= {f"{name}_{key}": value for key, value in found.items()}
        figures |= {f"{name}_chance_r@{k}": chance_recall(queries, gallery, k) for k in RECALL_AT}
    return figures
