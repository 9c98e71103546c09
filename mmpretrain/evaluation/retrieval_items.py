"""One walk over the samples that encodes every modality a retrieval needs.

Enter: the modalities. Leave: this rank's items of each, with the row they belong to: one item for each row that has
the modality, of a text one for each caption; keys, groups, captions and thumbnails beside them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.evaluation.base import EvaluationContext, Rows, TaskConfig
from mmpretrain.evaluation.labels import json_label
from mmpretrain.evaluation.lockstep import in_step
from mmpretrain.evaluation.retrieval_samples import thumbnail


@dataclass(frozen=True)
class Items:
    """Unit embeddings [n, D], their rows and their numbers among all items of the modality, int64 [n] each."""

    vectors: Tensor
    rows: Tensor
    numbers: Tensor

    def where(self, kept: Tensor) -> "Items":
        return Items(self.vectors[kept], self.rows[kept], self.numbers[kept])


@dataclass(frozen=True)
class Wanted:
    """What to note while walking."""

    modalities: tuple[str, ...]
    group_by: str | None
    """Key of the .json member that names a row's group."""
    text_batch: int
    pictures: str | None
    """The modality whose thumbnails are kept."""


@dataclass
class Encoded:
    """What this rank found; rows are numbered in the order of `keys`."""

    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    """One a row; empty for rows that hold less than two of the modalities."""
    captions: dict[str, list[str]] = field(default_factory=dict)
    thumbnails: list[bytes] = field(default_factory=list)
    items: dict[str, Items] = field(default_factory=dict)


def encode(context: EvaluationContext, task: TaskConfig, wanted: Wanted) -> Encoded:
    """Encode the task's samples. Communicates."""
    encoded = Encoded(captions={m: [] for m in wanted.modalities if context.has_captions(m)})
    owners: dict[str, list[int]] = {m: [] for m in wanted.modalities}
    empty = torch.zeros(0, context.model.facts.embed_dim, device=context.device)
    vectors = {m: [empty] for m in wanted.modalities}
    for rows in context.turns(task):
        for modality in wanted.modalities:
            if modality not in encoded.captions:
                embedded = context.embed(modality, context.stand_in(modality) if rows is None else rows.tensors)
                if rows is not None:
                    vectors[modality].append(embedded[rows.tensors[f"{modality}.present"].to(context.device)])
        if rows is not None:
            _note(encoded, owners, context, rows, wanted)
    for modality, texts in encoded.captions.items():
        vectors[modality].append(embed_texts(context, modality, texts, wanted.text_batch))
    for modality, found in vectors.items():
        numbers = torch.arange(len(owners[modality]), device=context.device)
        places = torch.tensor(owners[modality], dtype=torch.int64, device=context.device)
        encoded.items[modality] = Items(torch.cat(found), places, numbers)
    return encoded


def is_pictured(spec: FieldSpec) -> bool:
    """Whether a row is pixels [3, H, W] or frames of them [T, 3, H, W]."""
    return spec.dtype == "uint8" and spec.shape[-3:-2] == (3,)


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


def _note(
    encoded: Encoded, owners: dict[str, list[int]], context: EvaluationContext, rows: Rows, wanted: Wanted
) -> None:
    """Note of each row its key, group, captions and thumbnail."""
    present = {m: rows.tensors[f"{m}.present"].tolist() for m in wanted.modalities}
    for row, (key, members) in enumerate(zip(rows.keys, rows.members, strict=True)):
        held = [m for m in wanted.modalities if present[m][row]]
        for modality in held:
            texts = context.text(modality).captions(members) if modality in encoded.captions else None
            owners[modality] += [len(encoded.keys)] * (1 if texts is None else len(texts))
            encoded.captions.get(modality, []).extend(texts or ())
        if wanted.pictures in held:
            encoded.thumbnails.append(thumbnail(rows.tensors[wanted.pictures][row]))
        named = wanted.group_by is not None and len(held) > 1
        encoded.groups.append(json_label(members, wanted.group_by, key) if named else "")
        encoded.keys.append(key)
