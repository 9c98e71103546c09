"""A native pair as transformers' `CLIPModel`.

Enter: a dual encoder. Leave: its config and state dict, or the reasons why the layout cannot hold it.
The layout itself, which starting from published weights reads too, stands in `models/layouts/clip.py`.
"""

from collections.abc import Callable

import torch
from transformers import CLIPConfig, CLIPModel, PretrainedConfig, PreTrainedModel

from mmpretrain.models.config import ModelConfig
from mmpretrain.models.layouts.clip import LEGACY_EOS_ID, LOGIT_SCALE, clip_table
from mmpretrain.models.layouts.tables import HIDDEN_ACT, Shapes, State, to_theirs
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.publishing.dual_encoder import DualEncoder, differences, towers_of


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
    table = [*clip_table(pair.image.depth, pair.text.depth), *LOGIT_SCALE]
    return to_theirs(table, pair.state, shapes_of(CLIPModel, clip_config(pair)))


def shapes_of(kind: Callable[..., PreTrainedModel], config: PretrainedConfig) -> Shapes:
    """Shapes of the weights of a transformers model, without memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
