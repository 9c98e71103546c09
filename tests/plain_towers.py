"""The native towers written out in plain PyTorch, in the precision of the weights they are given.

Enter: weights by name, rows. Leave: unit embeddings that carry a gradient. Of the package only the random numbers are
used that define which patches are kept.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmpretrain.layers.noise import uniform

Weights = Mapping[str, Tensor]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def image_embeddings(
    weights: Weights, rows: Mapping[str, Tensor], patch: int, heads: int, drop: float, pre_norm: bool = True
) -> Tensor:
    """Class token, norm, blocks over the kept patches, projection."""
    own = _under(weights, "towers.image.")
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    pixels = (rows["image"].double() / 255 - mean) / std
    patches = functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
    tokens = patches @ own["stem.project.weight"].T + own["stem.positions.weight"]
    if drop:
        noise = uniform(rows["draw"], tokens.shape[1], "patch_dropout.image").numpy()
        kept = np.sort(np.argsort(noise, axis=1, kind="stable")[:, : round(tokens.shape[1] * (1 - drop))], axis=1)
        tokens = torch.stack([row[list(places)] for row, places in zip(tokens, kept, strict=True)])
    first = (own["class_token.weight"] + own["class_token.position"]).expand(len(tokens), 1, -1)
    tokens = torch.cat([first, tokens], 1)
    tokens = _norm(tokens, own, "pre_norm") if pre_norm else tokens
    hidden = _blocks(tokens, own, heads, torch.ones(tokens.shape[:2], dtype=torch.bool))
    return functional.normalize(hidden[:, 0] @ weights["projections.image.weight"].T, dim=1)


def text_embeddings(weights: Weights, rows: Mapping[str, Tensor], heads: int) -> Tensor:
    """Blocks over the words that count, their mean, projection."""
    own = _under(weights, "towers.text.")
    mask = rows["text.mask"]
    hidden = _blocks(own["stem.words.weight"][rows["text"]] + own["stem.positions.weight"], own, heads, mask)
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return functional.normalize(mean @ weights["projections.text.weight"].T, dim=1)


def _under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _norm(values: Tensor, own: Weights, name: str) -> Tensor:
    return functional.layer_norm(values, values.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], 1e-5)


def _linear(values: Tensor, own: Weights, name: str) -> Tensor:
    return values @ own[f"{name}.weight"].T + own[f"{name}.bias"]


def _blocks(tokens: Tensor, own: Weights, heads: int, mask: Tensor) -> Tensor:
    depth = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("transformer.blocks."))
    for number in range(depth):
        block = f"transformer.blocks.{number}"
        joined = _linear(_norm(tokens, own, f"{block}.norm1"), own, f"{block}.attention.in_proj")
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in joined.chunk(3, dim=2))
        logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        mixed = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ value
        tokens = tokens + _linear(mixed.transpose(1, 2).flatten(2), own, f"{block}.attention.out_proj")
        fed = functional.gelu(_linear(_norm(tokens, own, f"{block}.norm2"), own, f"{block}.mlp.fc1"))
        tokens = tokens + _linear(fed, own, f"{block}.mlp.fc2")
    return _norm(tokens, own, "norm")
