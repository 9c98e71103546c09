"""transformers' `SiglipModel` and our native pair: names, and the architecture in our terms.

Enter: depths, or a SiglipConfig. Leave: the table of weights, the towers that compute the same. The layout (Zhai et al.
2023, arXiv 2303.15343): no class token, an attention pool whose output is the embedding, bidirectional text that
attends to its padding and is read at its last position, a text head with bias.
"""

from transformers import SiglipConfig

from mmpretrain.models.layouts.clip import BLOCKS, text_rows
from mmpretrain.models.layouts.tables import Same, affine, block_rows, one
from mmpretrain.models.layouts.towers import Pixels, halves, native_tower, words_stem


def siglip_table(image_depth: int, text_depth: int) -> list[Same]:
    """Every weight but the logits' scale and bias, which stand in an objective: see `LOGITS`."""
    ours, theirs = "towers.image.", "vision_model."
    vision = [
        *affine(f"{ours}stem.project", f"{theirs}embeddings.patch_embedding"),
        *one(f"{ours}stem.positions.weight", f"{theirs}embeddings.position_embedding.weight"),
        *block_rows(ours, theirs, image_depth, BLOCKS),
        *affine(f"{ours}norm", f"{theirs}post_layernorm"),
        *_pool_rows(f"{ours}pool.", f"{theirs}head."),
    ]
    return [*vision, *text_rows(text_depth), *affine("projections.text", "text_model.head")]


LOGITS = [*one("logit_scale", "logit_scale"), *one("logit_bias", "logit_bias")]


def _pool_rows(ours: str, theirs: str) -> list[Same]:
    """The query and key-value projections are one matrix there."""
    rows = [*one(f"{ours}probe.weight", f"{theirs}probe"), *affine(f"{ours}norm", f"{theirs}layernorm")]
    for part in ("weight", "bias"):
        two = (f"{ours}attention.query.{part}", f"{ours}attention.key_value.{part}")
        rows.append(Same(two, (f"{theirs}attention.in_proj_{part}",)))
    for layer in ("attention.out_proj", "mlp.fc1", "mlp.fc2"):
        rows += affine(f"{ours}{layer}", f"{theirs}{layer}")
    return rows


def siglip_architecture(config: SiglipConfig, pixels: Pixels) -> dict[str, object]:
    """The native model that computes what this SiglipModel computes."""
    image, text = halves(config)
    patches = {**pixels.stem(image.image_size, image.patch_size), "bias": True}
    read_last = {"pooling": "last", "attend_padding": True, "projection_bias": True}
    return {
        "embed_dim": image.hidden_size,
        "towers": {
            "image": native_tower(image) | {"pooling": "map", "projection": False, "stem": patches},
            "text": native_tower(text) | read_last | {"stem": words_stem(text, None)},
        },
    }
