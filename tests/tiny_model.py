"""A real model small enough for a test, and rows for it.

Enter: objectives, a number of rows. Leave: an image tower of 16 patches with a class token, a text tower of 64 words, a
joint fusion; rows that follow from their position.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmpretrain.core.seeding import row_key
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig

IMAGE_SIZE, PATCH_SIZE, LENGTH, VOCABULARY = 16, 4, 14, 64
PAD, BOS, MASK, UNKNOWN, EOS = SPECIALS = (0, 1, 2, 62, 63)

_TOWER = {"kind": "native", "width": 32, "depth": 2, "heads": 4}
_PATCHES = {"kind": "patches", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
_WORDS = {"kind": "embeddings", "context_length": LENGTH, "vocab_size": VOCABULARY, "eos_id": EOS, "mask_id": MASK}
MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "towers": {
        "image": _TOWER | {"stem": _PATCHES, "pooling": "class"},
        "text": _TOWER | {"stem": _WORDS | {"special_ids": SPECIALS}},
    },
    "fusion": {"kind": "joint", "width": 24, "depth": 1, "heads": 4},
}


def build_model(objectives: Mapping[str, ObjectiveConfig], causal: bool = False) -> MultimodalTransformer:
    """The same weights at every call; `causal`: each word sees only earlier ones."""
    torch.manual_seed(7)
    towers = MODEL["towers"] | {"text": MODEL["towers"]["text"] | {"causal": causal}}
    config = ModelConfig.model_validate(MODEL | {"towers": towers})
    return MultimodalTransformer.create(resolve(config, None), objectives)


def rows_of(num_tokens: list[int]) -> dict[str, Tensor]:
    """One row for each text length; texts hold ordinary tokens only, then padding."""
    generator, rows = torch.Generator().manual_seed(0), len(num_tokens)
    counts = torch.arange(LENGTH) < torch.tensor(num_tokens)[:, None]
    ordinary = torch.randint(3, 62, (rows, LENGTH), generator=generator)
    size = (rows, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {
        "image": torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        "image.present": torch.ones(rows, dtype=torch.bool),
        "text": torch.where(counts, ordinary, PAD),
        "text.mask": counts,
        "text.present": torch.ones(rows, dtype=torch.bool),
        "position": torch.arange(rows),
        "sample": torch.arange(rows) + 100,
        "draw": torch.tensor([row_key(0, position) for position in range(rows)]),
    }
