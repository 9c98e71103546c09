"""transformers' `ViTModel` and our native image tower: names, and the architecture in our terms.

Enter: a depth, or a ViTConfig. Leave: the table of weights, the tower that computes the same. The layout (Dosovitskiy
et al. 2020, arXiv 2010.11929): class token, learned positions, a patch projection with bias, a norm after the blocks.
Its pooler has no place in the tower and is left over.
"""

from transformers import ViTConfig

from mmpretrain.models.layouts.tables import BlockNames, Same, affine, block_rows, one
from mmpretrain.models.layouts.towers import Pixels, edge, native_tower

_BLOCKS = BlockNames("layers", "attention", "attention.o_proj", "layernorm_before", "layernorm_after")


def vit_table(depth: int) -> list[Same]:
    """Every weight of the encoder."""
    ours, theirs = "towers.image.", "embeddings."
    return [
        *one(f"{ours}class_token.weight", f"{theirs}cls_token"),
        *affine(f"{ours}stem.project", f"{theirs}patch_embeddings.projection"),
        Same((f"{ours}class_token.position", f"{ours}stem.positions.weight"), (f"{theirs}position_embeddings",)),
        *block_rows(ours, "", depth, _BLOCKS),
        *affine(f"{ours}norm", "layernorm"),
    ]


def vit_architecture(config: ViTConfig, pixels: Pixels) -> dict[str, object]:
    """The native model that computes what this ViTModel computes."""
    stem = {**pixels.stem(edge(config.image_size), edge(config.patch_size)), "bias": True}
    tower = native_tower(config) | {"pooling": "class", "stem": stem}
    return {"embed_dim": config.hidden_size, "towers": {"image": tower}}
