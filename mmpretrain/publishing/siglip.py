"""A native pair as transformers' `SiglipModel`.

Enter: a dual encoder. Leave: its config and state dict, or the reasons why the layout cannot hold it.
The layout (Zhai et al. 2023, arXiv 2303.15343): patches with bias, an attention pool whose output is the embedding,
bidirectional text that attends to its padding and is read at its last position, a text head with bias.
"""

import torch
from transformers import SiglipConfig

from mmpretrain.models.config import ModelConfig
from mmpretrain.publishing.clip import tower_config
from mmpretrain.publishing.dual_encoder import DualEncoder, State, differences, towers_of
from mmpretrain.publishing.transformers_blocks import encoder_layers, norm, patch_convolution, under


def siglip_obstacles(config: ModelConfig) -> list[str]:
    """Why the model cannot be a SiglipModel; empty when it can."""
    found = towers_of(config)
    if isinstance(found, str):
        return [found]
    image, image_stem, text, _ = found
    return differences(
        {
            "towers.image.pooling": (image.pooling, "map"),
            "towers.image.causal": (image.causal, False),
            "towers.image.pre_norm": (image.pre_norm, False),
            "towers.image.stem.bias": (image_stem.bias, True),
            "towers.image.stem.positions": (image_stem.positions, "learned"),
            "towers.image.projection": (image.projection, False),
            "towers.image.width": (image.width, config.embed_dim),
            "towers.text.pooling": (text.pooling, "last"),
            "towers.text.causal": (text.causal, False),
            "towers.text.attend_padding": (text.attend_padding, True),
            "towers.text.pre_norm": (text.pre_norm, False),
            "towers.text.projection": (text.projection, True),
            "towers.text.projection_bias": (text.projection_bias, True),
        }
    )


def siglip_config(pair: DualEncoder) -> SiglipConfig:
    """The config of the same architecture."""
    return SiglipConfig(
        vision_config={
            **tower_config(pair.image),
            "image_size": pair.image_stem.image_size,
            "patch_size": pair.image_stem.patch_size,
        },
        text_config={
            **tower_config(pair.text),
            "vocab_size": pair.text_stem.vocab_size,
            "max_position_embeddings": pair.text_stem.context_length,
            "projection_size": pair.embed_dim,
            "eos_token_id": pair.text_stem.eos_id,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    )


def siglip_state(pair: DualEncoder) -> State:
    """The weights under SiglipModel's names."""
    image, text = pair.image_state, pair.text_state
    vision: State = {
        "embeddings.patch_embedding.weight": patch_convolution(
            image["stem.project.weight"], pair.image_stem.patch_size
        ),
        "embeddings.patch_embedding.bias": image["stem.project.bias"],
        "embeddings.position_embedding.weight": image["stem.positions.weight"],
        **encoder_layers(image, pair.image.depth),
        **norm("post_layernorm", image, "norm"),
        **_attention_pool(pair),
    }
    words: State = {
        "embeddings.token_embedding.weight": text["stem.words.weight"],
        "embeddings.position_embedding.weight": text["stem.positions.weight"],
        **encoder_layers(text, pair.text.depth),
        **norm("final_layer_norm", text, "norm"),
        "head.weight": pair.text_projection["weight"],
        "head.bias": pair.text_projection["bias"],
    }
    return {
        **under("vision_model.", vision),
        **under("text_model.", words),
        "logit_scale": pair.log_scale.reshape(1),
        "logit_bias": pair.bias.reshape(1),
    }


def _attention_pool(pair: DualEncoder) -> State:
    """`head.*`: the query and key-value projections are one matrix there."""
    image = pair.image_state
    state: State = {
        "head.probe": image["pool.probe.weight"].view(1, 1, -1),
        **norm("head.layernorm", image, "pool.norm"),
    }
    for part in ("weight", "bias"):
        joined = [image[f"pool.attention.query.{part}"], image[f"pool.attention.key_value.{part}"]]
        state[f"head.attention.in_proj_{part}"] = torch.cat(joined)
        state[f"head.attention.out_proj.{part}"] = image[f"pool.attention.out_proj.{part}"]
        state[f"head.mlp.fc1.{part}"] = image[f"pool.mlp.fc1.{part}"]
        state[f"head.mlp.fc2.{part}"] = image[f"pool.mlp.fc2.{part}"]
    return state
