"""Native blocks under the names of transformers' CLIP and SigLIP, which are the same for both.

Enter: the state dict of a native tower. Leave: the same weights under the encoder's names, fused
projections cut in three.
"""

from collections.abc import Mapping

from torch import Tensor

from mmpretrain.publishing.dual_encoder import State

HIDDEN_ACT = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our activation -> transformers' name."""


def encoder_layers(state: Mapping[str, Tensor], depth: int) -> State:
    """`encoder.layers.*` of a tower with `depth` blocks."""
    renamed: State = {}
    for number in range(depth):
        ours, theirs = f"transformer.blocks.{number}", f"encoder.layers.{number}"
        for part in ("weight", "bias"):
            fused = state[f"{ours}.attention.in_proj.{part}"].chunk(3)
            for name, piece in zip(("q_proj", "k_proj", "v_proj"), fused, strict=True):
                renamed[f"{theirs}.self_attn.{name}.{part}"] = piece
            renamed[f"{theirs}.self_attn.out_proj.{part}"] = state[f"{ours}.attention.out_proj.{part}"]
            renamed[f"{theirs}.layer_norm1.{part}"] = state[f"{ours}.norm1.{part}"]
            renamed[f"{theirs}.layer_norm2.{part}"] = state[f"{ours}.norm2.{part}"]
            renamed[f"{theirs}.mlp.fc1.{part}"] = state[f"{ours}.mlp.fc1.{part}"]
            renamed[f"{theirs}.mlp.fc2.{part}"] = state[f"{ours}.mlp.fc2.{part}"]
    return renamed


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    """The state with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in state.items()}


def norm(theirs: str, state: Mapping[str, Tensor], ours: str) -> State:
    """A LayerNorm under another name."""
    return {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}


def patch_convolution(weight: Tensor, patch: int) -> Tensor:
    """The patch projection [D, C p p] as a convolution's weight [D, C, p, p]."""
    return weight.view(weight.shape[0], -1, patch, patch)
