"""A native pair as open_clip's `CLIP`, loaded there by `local-dir:` or `hf-hub:`.

Enter: a dual encoder. Leave: `open_clip_config.json`'s content and the state dict, or the reasons why not.
open_clip itself is not imported, so that a pair can be exported where it is not installed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmpretrain.models.config import ModelConfig
from mmpretrain.models.layouts.tables import State
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.publishing.clip import shared_wants
from mmpretrain.publishing.dual_encoder import DualEncoder, differences, towers_of

Json = dict[str, object]


def open_clip_obstacles(config: ModelConfig) -> list[str]:
    """Why the model cannot be open_clip's CLIP; empty when it can."""
    found = towers_of(config)
    if isinstance(found, str):
        return [found]
    image, _, text, text_stem = found
    reasons = differences(shared_wants(config))
    if (image.activation == "quick_gelu") != (text.activation == "quick_gelu"):
        reasons.append(
            f"activations are {image.activation} and {text.activation}; quick_gelu is for both towers or none"
        )
    if text_stem.eos_id != (text_stem.vocab_size or 0) - 1:
        reasons.append(
            f"the end token has id {text_stem.eos_id} of {text_stem.vocab_size}; open_clip reads the text at its "
            "largest id, so the end token has to be the last one"
        )
    return reasons


def open_clip_config(pair: DualEncoder, has_tokenizer: bool) -> Json:
    """The content of `open_clip_config.json`; the tokenizer stands in the same folder."""
    text: Json = {
        **_tower_config(pair.text),
        "context_length": pair.text_stem.context_length,
        "vocab_size": pair.text_stem.vocab_size,
        "heads": pair.text.heads,
    }
    if has_tokenizer:
        text["hf_tokenizer_name"] = "."
    model: Json = {
        "embed_dim": pair.embed_dim,
        "quick_gelu": pair.image.activation == "quick_gelu",
        "vision_cfg": {
            **_tower_config(pair.image),
            "image_size": pair.image_stem.image_size,
            "patch_size": pair.image_stem.patch_size,
            "head_width": pair.image.width // pair.image.heads,
            "no_ln_pre": not pair.image.pre_norm,
        },
        "text_cfg": text,
    }
    preprocess: Json = {
        "mean": list(pair.image_stem.mean),
        "std": list(pair.image_stem.std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def open_clip_state(pair: DualEncoder) -> State:
    """The weights under open_clip's names; its projections multiply from the right."""
    image, text, patch = pair.image_state, pair.text_state, pair.image_stem.patch_size
    state: State = {
        "visual.class_embedding": image["class_token.weight"],
        "visual.positional_embedding": torch.cat([image["class_token.position"][None], image["stem.positions.weight"]]),
        "visual.conv1.weight": image["stem.project.weight"].view(pair.image.width, -1, patch, patch),
        "visual.proj": pair.image_projection["weight"].T,
        **_blocks("visual.transformer.resblocks", image, pair.image.depth),
        **_norm("visual.ln_post", image, "norm"),
        "token_embedding.weight": text["stem.words.weight"],
        "positional_embedding": text["stem.positions.weight"],
        **_blocks("transformer.resblocks", text, pair.text.depth),
        **_norm("ln_final", text, "norm"),
        "text_projection": pair.text_projection["weight"].T,
        "logit_scale": pair.log_scale.reshape(()),
    }
    return {**state, **_norm("visual.ln_pre", image, "pre_norm")} if pair.image.pre_norm else state


def _tower_config(tower: NativeTowerConfig) -> Json:
    config: Json = {"layers": tower.depth, "width": tower.width, "mlp_ratio": tower.mlp_ratio}
    if tower.activation == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    config["norm_kwargs"] = {"eps": tower.norm_eps}
    return config


def _norm(theirs: str, state: Mapping[str, Tensor], ours: str) -> State:
    return {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}


def _blocks(prefix: str, state: Mapping[str, Tensor], depth: int) -> State:
    renamed: State = {}
    for number in range(depth):
        ours, theirs = f"transformer.blocks.{number}", f"{prefix}.{number}"
        for part in ("weight", "bias"):
            renamed[f"{theirs}.attn.in_proj_{part}"] = state[f"{ours}.attention.in_proj.{part}"]
            renamed[f"{theirs}.attn.out_proj.{part}"] = state[f"{ours}.attention.out_proj.{part}"]
            renamed[f"{theirs}.mlp.c_fc.{part}"] = state[f"{ours}.mlp.fc1.{part}"]
            renamed[f"{theirs}.mlp.c_proj.{part}"] = state[f"{ours}.mlp.fc2.{part}"]
            renamed[f"{theirs}.ln_1.{part}"] = state[f"{ours}.norm1.{part}"]
            renamed[f"{theirs}.ln_2.{part}"] = state[f"{ours}.norm2.{part}"]
    return renamed
