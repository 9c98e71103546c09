"""transformers' `CLIPModel` and our native pair: names, and the architecture in our terms.

Enter: depths, or a CLIPConfig. Leave: the table of weights, the towers that compute the same. The layout (Radford et
al. 2021, arXiv 2103.00020): class token, learned positions, a norm before the first image block, causal text read at
its first end token, projections without bias.
"""

from transformers import CLIPConfig

from mmpretrain.models.layouts.tables import BlockNames, Same, affine, block_rows, one
from mmpretrain.models.layouts.towers import Pixels, halves, native_tower, words_stem

LEGACY_EOS_ID = 2
"""With this end id CLIPModel reads the text at its largest id instead."""
BLOCKS = BlockNames("encoder.layers", "self_attn", "self_attn.out_proj", "layer_norm1", "layer_norm2")
"""SigLIP names its blocks alike."""


def clip_table(image_depth: int, text_depth: int) -> list[Same]:
    """Every weight but the logit scale, which stands in an objective: see `LOGIT_SCALE`."""
    ours, theirs = "towers.image.", "vision_model."
    vision = [
        *one(f"{ours}class_token.weight", f"{theirs}embeddings.class_embedding"),
        *one(f"{ours}stem.project.weight", f"{theirs}embeddings.patch_embedding.weight"),
        Same(
            (f"{ours}class_token.position", f"{ours}stem.positions.weight"),
            (f"{theirs}embeddings.position_embedding.weight",),
        ),
        *affine(f"{ours}pre_norm", f"{theirs}pre_layrnorm"),
        *block_rows(ours, theirs, image_depth, BLOCKS),
        *affine(f"{ours}norm", f"{theirs}post_layernorm"),
    ]
    projections = [
        *one("projections.image.weight", "visual_projection.weight"),
        *one("projections.text.weight", "text_projection.weight"),
    ]
    return [*vision, *text_rows(text_depth), *projections]


LOGIT_SCALE = one("logit_scale", "logit_scale")


def text_rows(depth: int) -> list[Same]:
    """The text half, which SigLIP names alike."""
    ours, theirs = "towers.text.", "text_model."
    return [
        *one(f"{ours}stem.words.weight", f"{theirs}embeddings.token_embedding.weight"),
        *one(f"{ours}stem.positions.weight", f"{theirs}embeddings.position_embedding.weight"),
        *block_rows(ours, theirs, depth, BLOCKS),
        *affine(f"{ours}norm", f"{theirs}final_layer_norm"),
    ]


def clip_architecture(config: CLIPConfig, pixels: Pixels) -> dict[str, object]:
    """The native model that computes what this CLIPModel computes."""
    image, text = halves(config)
    eos_id = text.vocab_size - 1 if text.eos_token_id == LEGACY_EOS_ID else text.eos_token_id
    patches = {**pixels.stem(image.image_size, image.patch_size), "bias": False}
    return {
        "embed_dim": config.projection_dim,
        "towers": {
            "image": native_tower(image) | {"pooling": "class", "pre_norm": True, "stem": patches},
            "text": native_tower(text) | {"pooling": "eos", "causal": True, "stem": words_stem(text, eos_id)},
        },
    }
