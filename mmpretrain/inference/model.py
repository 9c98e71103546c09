"""A trained model with its processor: embeddings, similarity, zero-shot classes and the answers of trained heads.

Enter: inputs by modality, one or a list of them. Leave: unit embeddings and scores, fp32 on the CPU. Refused: a
modality the model lacks, a head that was never trained, inputs that cannot be used.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.types import TensorDict
from mmpretrain.evaluation.base import EvaluationContext, Rows
from mmpretrain.evaluation.zeroshot import ClassSet, check_classes, class_embeddings
from mmpretrain.inference.media import Media
from mmpretrain.inference.processor import Inputs, Processor, as_list
from mmpretrain.modalities.label import LabelCodecConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.supervised import Supervised

BATCH = 64
"""Inputs per call of a tower."""
Meaning = Literal["cosine", "probability", "value"]


@dataclass(frozen=True)
class Scores:
    """One row for each input, one column for each class, tag or value."""

    names: tuple[str, ...]
    values: Tensor
    """fp32 [rows, names]."""
    meaning: Meaning
    """cosine: nearness to a class's prompts, no probability; probability: of a class or of each tag; value: as is."""

    def top(self, count: int = 1) -> list[list[tuple[str, float]]]:
        """The best names of each row, best first; of values all, in their order."""
        if self.meaning == "value":
            return [list(zip(self.names, row, strict=True)) for row in self.values.tolist()]
        best = self.values.topk(min(count, len(self.names)), dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.names[n], value) for n, value in zip(*row, strict=True)] for row in pairs]


class Model:
    """A network in evaluation mode on a device, and what makes its inputs."""

    def __init__(
        self, network: MultimodalTransformer, processor: Processor, source: Path, device: torch.device
    ) -> None:
        """`source`: where it was loaded from."""
        network.train(False)
        nn.Module.to(network, device)
        self.network, self.processor, self.source, self.device = network, processor, source, device
        self._context = EvaluationContext(network, processor.codecs, _no_rows, device)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model can embed."""
        return tuple(self.processor.codecs)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with anything an embedding depends on: weights, architecture, codecs."""
        digest = hashlib.sha256()
        configs = {name: self.processor.configs[name].model_dump(mode="json") for name in self.modalities}
        digest.update(json.dumps([self.network.config.model, configs], sort_keys=True).encode())
        state = self.network.state_dict()
        for name in sorted(name for name in state if name.startswith(("towers.", "projections."))):
            digest.update(name.encode())
            digest.update(state[name].detach().float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def embed(self, **inputs: Inputs) -> TensorDict:
        """Unit embeddings of each modality, fp32 [inputs, embed_dim]."""
        return {modality: self._embed(modality, as_list(given)) for modality, given in inputs.items()}

    def embed_fields(self, modality: str, fields: TensorDict) -> Tensor:
        """Unit embeddings of batch fields, fp32 [rows, embed_dim]."""
        return self._context.embed(modality, fields).cpu()

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Cosines of embeddings: [n, embed_dim] and [m, embed_dim] to [n, m]."""
        return first @ second.T

    def classify(self, classes: Sequence[str], templates: Sequence[str] = ("{}",), **inputs: Inputs) -> Scores:
        """Zero-shot: cosines of the inputs of one modality with the prompts of each class."""
        if isinstance(classes, str):
            raise ConfigError(f"classes are {classes!r}, one text; give a list of names")
        if len(inputs) != 1:
            raise ConfigError(f"saw inputs of {sorted(inputs) or 'no modality'}; classify those of one modality")
        weights = self.class_vectors(ClassSet(classes=list(classes), templates=list(templates)))
        (vectors,) = self.embed(**inputs).values()
        return Scores(tuple(classes), self.similarity(vectors, weights), "cosine")

    def class_vectors(self, known: ClassSet) -> Tensor:
        """One unit vector a class, fp32 [classes, embed_dim]."""
        text = self.processor.text_modality
        if text is None:
            raise ConfigError(f"zero-shot classes are texts; {self.source} reads {', '.join(self.modalities)} alone")
        check_classes(known, "classes")
        return class_embeddings(self._context, text, known, BATCH).cpu()

    def predict(self, objective: str | None = None, **inputs: Inputs) -> Scores:
        """What a supervised head says of rows that may have several modalities; None where a row lacks one."""
        name, head = self.head(objective)
        rows = {modality: as_list(given) for modality, given in inputs.items()}
        if len({len(given) for given in rows.values()}) != 1:
            raise DataError(f"saw { ({m: len(g) for m, g in rows.items()}) } inputs; give as many of each modality")
        if unread := sorted(rows.keys() - set(head.inputs)):
            raise ConfigError(f"objective {name} reads {', '.join(head.inputs)}, not {', '.join(unread)}")
        (count,) = {len(given) for given in rows.values()}
        if count == 0:
            raise DataError("there are no inputs; give at least one")
        parts = []
        for start in range(0, count, BATCH):
            given = {modality: media[start : start + BATCH] for modality, media in rows.items()}
            parts.append(self.predict_fields(name, self._joined(head, given)).values)
        return Scores(self.output_names(head), torch.cat(parts), _meaning(head))

    def predict_fields(self, objective: str, fields: TensorDict) -> Scores:
        """What a supervised head says of batch fields, which tell by "<modality>.present" what a row has."""
        _, head = self.head(objective)
        batch = {name: tensor.to(self.device) for name, tensor in fields.items()}
        with torch.no_grad(), self._context.autocast():
            outputs = head.predict(self.network.encoder(batch)).float().cpu()
        return Scores(self.output_names(head), _activated(head, outputs), _meaning(head))

    def head(self, objective: str | None) -> tuple[str, Supervised]:
        """Name and module of a supervised objective; without a name the only one."""
        heads = {name: each for name, each in self.network.objectives.items() if isinstance(each, Supervised)}
        if not heads:
            raise ConfigError(
                f"{self.source} was trained with no supervised objective, so it has no classes of its own; "
                "name classes to have it classify zero-shot"
            )
        if objective is None and len(heads) > 1:
            raise ConfigError(f"{self.source} has several heads ({', '.join(heads)}); choose one by its objective")
        name = next(iter(heads)) if objective is None else objective
        if name not in heads:
            raise ConfigError(f"{self.source} has no supervised objective {name!r}; it has {', '.join(heads)}")
        return name, heads[name]

    def output_names(self, head: Supervised) -> tuple[str, ...]:
        """The classes as the label's codec names them, else their numbers."""
        codec = self.processor.configs.get(head.label)
        if isinstance(codec, LabelCodecConfig) and codec.classes is not None:
            return codec.classes
        return tuple(str(number) for number in range(head.head.predict.weight.shape[0]))

    def absent(self, modality: str) -> dict[str, np.ndarray]:
        """The fields of a row that lacks a modality."""
        fields = self.processor.decoder(modality).fields
        return {name: np.zeros(spec.shape, spec.dtype) for name, spec in fields.items()}

    def _embed(self, modality: str, media: list[Media]) -> Tensor:
        starts = range(0, max(len(media), 1), BATCH)
        return torch.cat(
            [self.embed_fields(modality, self.processor(**{modality: media[n : n + BATCH]})) for n in starts]
        )

    def _joined(self, head: Supervised, rows: Mapping[str, Sequence[Media | None]]) -> TensorDict:
        """The batch fields of rows of which some lack a modality."""
        count = len(next(iter(rows.values())))
        batch: TensorDict = {}
        for modality in head.inputs:
            given = rows.get(modality, [None] * count)
            present = [number for number, media in enumerate(given) if media is not None]
            empty = self.absent(modality)
            fields = {name: torch.from_numpy(np.stack([array] * count)) for name, array in empty.items()}
            if present:
                some = self.processor(**{modality: [media for media in given if media is not None]})
                for name, tensor in some.items():
                    fields[name][present] = tensor
            held = torch.zeros(count, dtype=torch.bool)
            held[present] = True
            batch |= fields | {f"{modality}.present": held}
        return batch


def _activated(head: Supervised, outputs: Tensor) -> Tensor:
    if head.target == "class":
        return outputs.softmax(dim=1)
    return outputs.sigmoid() if head.target == "tags" else outputs


def _meaning(head: Supervised) -> Meaning:
    return "value" if head.target == "values" else "probability"


def _no_rows(shards: Sequence[str] | None, max_samples: int | None) -> Iterator[Rows]:
    """A loaded model has no shards of its own."""
    return iter(())
