"""What a model makes of rows from which a modality was taken away.

Enter: a batch and the names of modalities. Leave: the batch as if no row had them, and an encoder through which an
objective predicts and counts the very rows of the whole batch while the model sees the reduced one. A fusion sees
nothing of an absent modality; what reads a tower's tokens past the fusion gets those of blank inputs.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mmpretrain.core.types import TensorDict
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import Encoder


def without(batch: TensorDict, modalities: Collection[str]) -> TensorDict:
    """The batch as if no row had these modalities: marked absent, their inputs zeros, their token masks unchanged."""
    hidden = {name for m in modalities for name in (m, f"{m}.present")}
    return {name: torch.zeros_like(value) if name in hidden else value for name, value in batch.items()}


class AblatedEncoder:
    """Implements `objectives.base.Encoder`: towers and fusion run on `without(batch, modalities)`.

    Rows, labels, draws and targets are those of the whole batch, so that an objective counts the same targets.
    """

    def __init__(self, model: MultimodalTransformer, batch: TensorDict, modalities: Collection[str]) -> None:
        self._whole: Encoder = model.encoder(batch)
        self._seen: Encoder = model.encoder(without(batch, modalities))

    @property
    def batch(self) -> TensorDict:
        return self._whole.batch

    def tower(self, modality: str, *, ids: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        return self._seen.tower(modality, ids=ids, keep=keep)

    def embed(self, modality: str) -> Tensor:
        return self._seen.embed(modality)

    def fuse(self, outputs: Mapping[str, TensorDict]) -> TensorDict:
        return self._seen.fuse(outputs)

    def vocabulary_logits(self, modality: str, hidden: Tensor) -> Tensor:
        return self._seen.vocabulary_logits(modality, hidden)

    def patches(self, modality: str) -> Tensor:
        return self._whole.patches(modality)
