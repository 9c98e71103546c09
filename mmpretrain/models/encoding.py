"""The model as objectives see it for one chunk of rows: every encoding is computed once, when first asked for.

Enter: the parts of a model by input (inputs may share a tower) and a batch of tensors. Leave: tower outputs, unit
embeddings, fused tokens. Refused: a tower or a fusion the model does not have. Legend as in `objectives/base.py`.
"""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.fusions.base import Fusion
from mmpretrain.layers.pair_tiles import full_precision
from mmpretrain.models.towers.base import Tower

_Request = tuple[str, int | None, int | None]


def unit(projected: Tensor) -> Tensor:
    """Vectors of length 1 in fp32, whatever lower precision made them."""
    return F.normalize(full_precision(projected), dim=-1)


def run_fusion(fusion: Fusion, outputs: Mapping[str, TensorDict], masks: Mapping[str, Tensor | None]) -> TensorDict:
    """Give a fusion what it reads of tower outputs; masks are True where a token counts."""
    if fusion.reads == "tokens":
        fused: TensorDict = fusion({modality: output["tokens"] for modality, output in outputs.items()}, masks)
        return fused
    some = {modality: None if mask is None else mask.any(dim=1, keepdim=True) for modality, mask in masks.items()}
    return cast(
        TensorDict, fusion({modality: output["pooled"].unsqueeze(1) for modality, output in outputs.items()}, some)
    )


class ChunkEncoder:
    """Implements `objectives.base.Encoder`; requests are equal when they name the very same tensors."""

    def __init__(
        self,
        towers: Mapping[str, Tower],
        projections: Mapping[str, nn.Module],
        fusion: Fusion | None,
        batch: TensorDict,
    ) -> None:
        self._towers, self._projections, self._fusion = towers, projections, fusion
        self._batch = batch
        self._outputs: dict[_Request, TensorDict] = {}
        self._embedded: TensorDict = {}
        self._fused: dict[tuple[tuple[str, int], ...], TensorDict] = {}
        self._alive: list[object] = []
        """What stands in a request by its id must not be freed, or another object could take the id."""

    @property
    def batch(self) -> TensorDict:
        return self._batch

    def tower(self, modality: str, *, ids: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        request = (modality, None if ids is None else id(ids), None if keep is None else id(keep))
        if request not in self._outputs:
            tower, mask = self._tower(modality), self._counting(modality)
            inputs = self._batch[modality] if ids is None else ids
            shown = tower.kept_tokens(self._batch.get("draw"), mask) if keep is None else keep
            self._outputs[request] = tower(inputs, mask, shown)
            self._alive += [ids, keep]
        return self._outputs[request]

    def embed(self, modality: str) -> Tensor:
        if modality not in self._embedded:
            pooled = self.tower(modality)["pooled"]
            self._embedded[modality] = unit(self._projections[modality](pooled))
        return self._embedded[modality]

    def fuse(self, outputs: Mapping[str, TensorDict]) -> TensorDict:
        if self._fusion is None:
            raise ConfigError("an objective asked for fused tokens and the model has no fusion; set model.fusion.kind")
        request = tuple((modality, id(output)) for modality, output in sorted(outputs.items()))
        if request not in self._fused:
            masks = {modality: self._present_tokens(modality, output) for modality, output in outputs.items()}
            self._fused[request] = run_fusion(self._fusion, outputs, masks)
            self._alive += outputs.values()
        return self._fused[request]

    def vocabulary_logits(self, modality: str, hidden: Tensor) -> Tensor:
        return self._tower(modality).vocabulary_logits(hidden)

    def patches(self, modality: str) -> Tensor:
        return self._tower(modality).patches(self._batch[modality])

    def _tower(self, modality: str) -> Tower:
        if modality not in self._towers:
            raise ConfigError(f"the model has towers {sorted(self._towers)} and none for {modality!r}")
        return self._towers[modality]

    def _counting(self, modality: str) -> Tensor | None:
        """The mask of the inputs with all of a dummy's: no tower then meets a row in which nothing counts, where
        attention may become NaN; what comes of it weighs nothing."""
        mask, present = self._batch.get(f"{modality}.mask"), self._batch.get(f"{modality}.present")
        return mask if mask is None or present is None else mask | ~present.unsqueeze(1)

    def _present_tokens(self, modality: str, output: TensorDict) -> Tensor | None:
        """The tower's mask without the tokens of rows that lack the modality: nothing may attend to a dummy."""
        mask, present = output.get("mask"), self._batch.get(f"{modality}.present")
        if present is None:
            return mask
        if mask is None:
            return present.unsqueeze(1).expand(output["tokens"].shape[:2])
        return mask & present.unsqueeze(1)
