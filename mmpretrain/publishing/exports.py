"""Every layout a model can be published in beside its own.

Enter: a loaded model, an empty folder, perhaps a tokenizer folder. Leave: `clip/`, `siglip/` and `open_clip/` where the
layout can hold the model, and for the others the reasons why not. Refused: a tower and layout that disagree about a
weight's name or shape (loading is strict).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipModel,
    SiglipProcessor,
)

from mmpretrain.modalities.image import PatchesStemConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.layouts.tables import State
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.publishing.clip import clip_config, clip_obstacles, clip_state
from mmpretrain.publishing.dual_encoder import DualEncoder, dual_encoder
from mmpretrain.publishing.open_clip import open_clip_config, open_clip_obstacles, open_clip_state
from mmpretrain.publishing.siglip import siglip_config, siglip_obstacles, siglip_state


@dataclass(frozen=True)
class Export:
    """One layout: when it fits, and how it is written."""

    name: str
    """Name of its folder."""
    obstacles: Callable[[ModelConfig], list[str]]
    write: Callable[[DualEncoder, Path, Path | None], None]


def write_exports(model: MultimodalTransformer, folder: Path, tokenizer: Path | None) -> dict[str, list[str]]:
    """Write every layout that fits; maps each layout's name to the obstacles met (none: it was written)."""
    config = model.config.parsed_model()
    met = {export.name: export.obstacles(config) for export in EXPORTS}
    for export in EXPORTS:
        if not met[export.name]:
            (folder / export.name).mkdir()
            export.write(dual_encoder(model), folder / export.name, tokenizer)
    return met


def image_processor(side: int, normalised_as: PatchesStemConfig | None) -> CLIPImageProcessor:
    """Shortest edge to `side`, centre crop; floats normalised as a stem does it, or (None) bytes as our model takes."""
    statistics = normalised_as or PatchesStemConfig()
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=3,
        do_rescale=normalised_as is not None,
        do_normalize=normalised_as is not None,
        image_mean=list(statistics.mean),
        image_std=list(statistics.std),
    )


def _write_clip(pair: DualEncoder, folder: Path, tokenizer: Path | None) -> None:
    _save(CLIPModel(clip_config(pair)), clip_state(pair), folder)
    _save_processor(CLIPProcessor, pair, folder, tokenizer)


def _write_siglip(pair: DualEncoder, folder: Path, tokenizer: Path | None) -> None:
    _save(SiglipModel(siglip_config(pair)), siglip_state(pair), folder)
    _save_processor(SiglipProcessor, pair, folder, tokenizer)


def _write_open_clip(pair: DualEncoder, folder: Path, tokenizer: Path | None) -> None:
    config = open_clip_config(pair, has_tokenizer=tokenizer is not None)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.float().contiguous() for name, tensor in open_clip_state(pair).items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        sized_tokenizer(tokenizer, pair.text_stem.context_length).save_pretrained(folder)


EXPORTS = (
    Export("clip", clip_obstacles, _write_clip),
    Export("siglip", siglip_obstacles, _write_siglip),
    Export("open_clip", open_clip_obstacles, _write_open_clip),
)


def _save(empty: PreTrainedModel, state: State, folder: Path) -> None:
    empty.load_state_dict({name: tensor.float().contiguous() for name, tensor in state.items()}, strict=True)
    empty.save_pretrained(folder)


def _save_processor(
    kind: Callable[..., ProcessorMixin], pair: DualEncoder, folder: Path, tokenizer: Path | None
) -> None:
    images = image_processor(pair.image_stem.image_size, pair.image_stem)
    if tokenizer is None:
        images.save_pretrained(folder)
    else:
        kind(images, sized_tokenizer(tokenizer, pair.text_stem.context_length)).save_pretrained(folder)


def sized_tokenizer(folder: Path, length: int) -> PreTrainedTokenizerBase:
    """Cuts and pads to `length` on the right, as training did whatever the tokenizer's own side was."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = length
    return tokenizer
