"""Zero-shot classification: the class whose prompts' mean embedding is nearest.

Enter: samples with a label in their .json member, and a `classes.json` ({"classes": [...], "templates": ["a photo of a
{}."], "label_key": "label"}). Leave: top-1 and top-5 accuracy with chance. Per class, the embeddings of all templates
are averaged after normalisation and normalised again, as CLIP does (Radford et al. 2021, arXiv 2103.00020, section
3.1.4). A label that is no class, a template without {} and an unreadable file are refused.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.core.config import Config
from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.evaluation.labels import json_label


class ClassSet(Config):
    """What a `classes.json` holds."""

    classes: list[str]
    templates: list[str]
    label_key: str = "label"


class ZeroShotConfig(TaskConfig):
    """Zero-shot classification of one modality by prompts."""

    kind: Literal["zeroshot"] = "zeroshot"
    classes: str
    """Path of a classes.json."""
    modality: str = "image"
    text: str = "text"
    """The text modality whose tower reads the prompts."""
    text_batch: int = 256
    """Prompts per call of the text tower."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality, self.text)

    def figure_groups(self, towers: Collection[str]) -> frozenset[str]:
        return frozenset({"zeroshot"})  # its figures do not name the modality

    def check_files(self) -> None:
        read_classes(Path(self.classes))

    def run(self, context: EvaluationContext) -> dict[str, float]:
        known = read_classes(Path(self.classes))
        weights = class_embeddings(context, self.text, known, self.text_batch)
        top = min(5, len(known.classes))
        hits = torch.zeros(3, dtype=torch.float64)
        for rows in context.turns(self):
            fields = context.stand_in(self.modality) if rows is None else rows.tensors
            scores = context.embed(self.modality, fields) @ weights.T
            if rows is not None:
                present = rows.tensors[f"{self.modality}.present"].nonzero().flatten().tolist()
                labels = [
                    class_index(json_label(rows.members[r], known.label_key, rows.keys[r]), known) for r in present
                ]
                hits += top_hits(scores[present], torch.tensor(labels, device=scores.device), top)
        first, among, count = all_reduce_sum(hits.to(context.device)).tolist()
        if not count:
            raise DataError(f"zero-shot evaluation saw no samples that hold {self.modality!r}; check `shards`")
        chance = 1.0 / len(known.classes)
        return self.named({"zeroshot_top1": first / count, "zeroshot_top5": among / count, "zeroshot_chance": chance})


def read_classes(path: Path) -> ClassSet:
    """Read and check a classes.json."""
    try:
        known = ClassSet.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(
            f'cannot read the classes of {path}: {error}; expected {{"classes": [...], "templates": ["... {{}} ..."]}}'
        ) from error
    check_classes(known, str(path))
    return known


def check_classes(known: ClassSet, where: str) -> None:
    """Refuse templates that hold no class name, and names that are missing or repeated."""
    unfillable = [template for template in known.templates if "{}" not in template]
    if unfillable or not known.templates:
        raise DataError(f"{where}: each template needs a {{}} for the class name; saw {unfillable or 'no templates'}")
    if len(set(known.classes)) != len(known.classes) or not known.classes:
        raise DataError(f"{where}: class names must be present and distinct; saw {len(known.classes)}")


def class_embeddings(context: EvaluationContext, modality: str, known: ClassSet, batch: int) -> Tensor:
    """One unit vector a class, fp32 [classes, embed_dim]; every rank computes all of them, in step."""
    prompts = [template.replace("{}", name) for name in known.classes for template in known.templates]
    vectors = embed_prompts(context, modality, prompts, batch)
    return F.normalize(vectors.view(len(known.classes), len(known.templates), -1).mean(dim=1), dim=-1)


def embed_prompts(context: EvaluationContext, modality: str, prompts: list[str], batch: int) -> Tensor:
    """Unit embeddings of texts that are the same on every rank."""
    codec = context.text(modality)
    parts = []
    for start in range(0, len(prompts), batch):
        fields = codec.encode(prompts[start : start + batch])
        parts.append(context.embed(modality, {name: torch.from_numpy(array) for name, array in fields.items()}))
    return torch.cat(parts)


def top_hits(scores: Tensor, labels: Tensor, top: int) -> Tensor:
    """[hits at 1, hits among `top`, rows], float64 [3] on the CPU; an equal score of another class stands before."""
    own = scores.gather(1, labels[:, None])
    before = (~(scores < own)).sum(dim=1) - 1
    return torch.tensor([(before < 1).sum(), (before < top).sum(), len(labels)], dtype=torch.float64)


def class_index(label: str, known: ClassSet) -> int:
    """Index of a label, given as class name or as index."""
    if label in known.classes:
        return known.classes.index(label)
    if label.isdecimal() and len(label) < 19 and int(label) < len(known.classes):
        return int(label)
    raise DataError(f"label {label!r} is not among the {len(known.classes)} classes ({known.classes[:5]}, ...)")
