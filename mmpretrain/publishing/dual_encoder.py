"""The image-text pair inside a model, as the layouts of other libraries see it.

Enter: a model config, then a loaded model. Leave: reasons why a pair cannot be exported, or its configs and weights.
Refused: nothing here; each layout adds the reasons of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpretrain.core.registry import kind_of
from mmpretrain.modalities.image import PatchesStemConfig
from mmpretrain.modalities.text import EmbeddingsStemConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.layouts.tables import State
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.objectives.infonce import InfoNCE
from mmpretrain.objectives.siglip import SigLIP


@dataclass(frozen=True)
class DualEncoder:
    """Native towers with the state dicts of tower and projection (empty where there is none)."""

    embed_dim: int
    image: NativeTowerConfig
    image_stem: PatchesStemConfig
    text: NativeTowerConfig
    text_stem: EmbeddingsStemConfig
    image_state: Mapping[str, Tensor]
    text_state: Mapping[str, Tensor]
    image_projection: Mapping[str, Tensor]
    text_projection: Mapping[str, Tensor]
    log_scale: Tensor
    """Logarithm of the logit scale, already within its bound, [1]."""
    bias: Tensor
    """Offset of the logits, [1]; zero where the loss has none."""

    @property
    def state(self) -> State:
        """Everything under the model's own names, the logits' scale and bias as `logit_scale` and `logit_bias`."""
        parts = {
            "towers.image": self.image_state,
            "towers.text": self.text_state,
            "projections.image": self.image_projection,
            "projections.text": self.text_projection,
        }
        named = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        return named | {"logit_scale": self.log_scale, "logit_bias": self.bias}


def towers_of(
    config: ModelConfig,
) -> tuple[NativeTowerConfig, PatchesStemConfig, NativeTowerConfig, EmbeddingsStemConfig] | str:
    """Both towers with their stems, or the reason why the model holds no native image-text pair."""
    if not {"image", "text"} <= set(config.towers):
        return f"the model has towers {sorted(config.towers)}; the layout needs image and text"
    image, text = config.towers["image"], config.towers["text"]
    for name, tower in (("image", image), ("text", text)):
        if not isinstance(tower, NativeTowerConfig):
            return f"the {name} tower is of kind {kind_of(type(tower))}; the layout needs a native one"
    assert isinstance(image, NativeTowerConfig) and isinstance(text, NativeTowerConfig)
    if not isinstance(image.stem, PatchesStemConfig) or not isinstance(text.stem, EmbeddingsStemConfig):
        return "the stems are not patches and embeddings"
    return image, image.stem, text, text.stem


def dual_encoder(model: MultimodalTransformer) -> DualEncoder:
    """The pair of a model for which `towers_of` found one."""
    config = model.config.parsed_model()
    found = towers_of(config)
    assert not isinstance(found, str), found
    image, image_stem, text, text_stem = found
    log_scale, bias = _scale_and_bias(model)
    return DualEncoder(
        embed_dim=config.embed_dim,
        image=image,
        image_stem=image_stem,
        text=text,
        text_stem=text_stem,
        image_state=model.towers["image"].state_dict(),
        text_state=model.towers["text"].state_dict(),
        image_projection=model.projections["image"].state_dict(),
        text_projection=model.projections["text"].state_dict(),
        log_scale=log_scale,
        bias=bias,
    )


def _scale_and_bias(model: MultimodalTransformer) -> tuple[Tensor, Tensor]:
    """Of the contrastive objective over image and text; scale 1 and bias 0 where none was trained."""
    for objective in model.objectives.values():
        if isinstance(objective, InfoNCE | SigLIP) and set(objective.pair) == {"image", "text"}:
            log_scale = objective.logit_scale().detach().log()
            bias = objective.logit_bias().detach() if isinstance(objective, SigLIP) else torch.zeros(1)
            return log_scale, bias
    return torch.zeros(1), torch.zeros(1)


def differences(wanted: Mapping[str, tuple[object, object]]) -> list[str]:
    """One line for each option ("towers.image.pooling") whose value (first) is not the one needed (second)."""
    return [
        f"{option} is {seen!r}, the layout needs {needed!r}"
        for option, (seen, needed) in wanted.items()
        if seen != needed
    ]
