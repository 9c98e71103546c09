"""A native pair as transformers' `CLIPModel`.

Enter: a dual encoder. Leave: its config and state dict, or the reasons why the layout cannot hold it.
The layout (Radford et al. 2021, arXiv 2103.00020): class token, learned positions, a norm before the first image block,
causal text read at its first end token, projections without bias.
"""

import torch
from torch import Tensor
from transformers import CLIPConfig

from mmpretrain.models.config import ModelConfig
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.publishing.dual_encoder import DualEncoder, State, differences, towers_of
from mmpretrain.publishing.transformers_blocks import HIDDEN_ACT, encoder_layers, norm, patch_convolution, under

LEGACY_EOS_ID = 2
"""With this end id CLIPModel reads the text at its largest id instead."""


def clip_obstacles(config: ModelConfig) -> list[str]:
    """Why the model cannot be a CLIPModel; empty when it can."""
    found = towers_of(config)
    if isinstance(found, str):
        return [found]
    image, _, _, text_stem = found
    reasons = differences({**shared_wants(config), "towers.image.pre_norm": (image.pre_norm, True)})
    if text_stem.eos_id == LEGACY_EOS_ID:
        reasons.append(f"the end token has id {LEGACY_EOS_ID}, which CLIPModel reads in another way")
    return reasons


def shared_wants(config: ModelConfig) -> dict[str, tuple[object, object]]:
    """What `CLIPModel` and open_clip's `CLIP` both need, as {option: (seen, needed)}."""
    found = towers_of(config)
    assert not isinstance(found, str)
    image, image_stem, text, _ = found
    return {
        "towers.image.pooling": (image.pooling, "class"),
        "towers.image.causal": (image.causal, False),
        "towers.image.stem.bias": (image_stem.bias, False),
        "towers.image.stem.positions": (image_stem.positions, "learned"),
        "towers.image.projection": (image.projection, True),
        "towers.image.projection_bias": (image.projection_bias, False),
        "towers.text.pooling": (text.pooling, "eos"),
        "towers.text.causal": (text.causal, True),
        "towers.text.pre_norm": (text.pre_norm, False),
        "towers.text.projection": (text.projection, True),
        "towers.text.projection_bias": (text.projection_bias, False),
    }


def clip_config(pair: DualEncoder) -> CLIPConfig:
    """The config of the same architecture."""
    return CLIPConfig(
        projection_dim=pair.embed_dim,
        logit_scale_init_value=float(pair.log_scale),
        vision_config={
            **tower_config(pair.image),
            "image_size": pair.image_stem.image_size,
            "patch_size": pair.image_stem.patch_size,
            "projection_dim": pair.embed_dim,
        },
        text_config={
            **tower_config(pair.text),
            "vocab_size": pair.text_stem.vocab_size,
            "max_position_embeddings": pair.text_stem.context_length,
            "projection_dim": pair.embed_dim,
            "eos_token_id": pair.text_stem.eos_id,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    )


def tower_config(tower: NativeTowerConfig) -> dict[str, int | float | str]:
    """The fields that image and text configs of CLIP and SigLIP share."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": HIDDEN_ACT[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def clip_state(pair: DualEncoder) -> State:
    """The weights under CLIPModel's names."""
    image, text = pair.image_state, pair.text_state
    vision: State = {
        "embeddings.class_embedding": image["class_token.weight"],
        "embeddings.patch_embedding.weight": patch_convolution(
            image["stem.project.weight"], pair.image_stem.patch_size
        ),
        "embeddings.position_embedding.weight": class_and_patch_positions(pair),
        **norm("pre_layrnorm", image, "pre_norm"),
        **encoder_layers(image, pair.image.depth),
        **norm("post_layernorm", image, "norm"),
    }
    words: State = {
        "embeddings.token_embedding.weight": text["stem.words.weight"],
        "embeddings.position_embedding.weight": text["stem.positions.weight"],
        **encoder_layers(text, pair.text.depth),
        **norm("final_layer_norm", text, "norm"),
    }
    return {
        **under("vision_model.", vision),
        **under("text_model.", words),
        "visual_projection.weight": pair.image_projection["weight"],
        "text_projection.weight": pair.text_projection["weight"],
        "logit_scale": pair.log_scale.reshape(()),
    }


def class_and_patch_positions(pair: DualEncoder) -> Tensor:
    """[1 + L, D]: the class token's position, then those of the patches."""
    image = pair.image_state
    return torch.cat([image["class_token.position"][None], image["stem.positions.weight"]])
