"""Which tensors of ours hold the numbers of which tensors of another library, read in both directions.

Enter: tables of `Same` rows and a state under one side's names. Leave: the same numbers under the other side's names.
Layouts differ only in how numbers stand one behind the other: fused query, key and value are the three matrices below
each other, a class token's position is the first row of theirs, a patch projection is a flattened convolution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpretrain.layers.blocks import Activation

State = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]

HIDDEN_ACT: dict[Activation, str] = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our activation -> transformers' name."""


@dataclass(frozen=True)
class Same:
    """Tensors that hold the same numbers: flattened and joined in this order, both sides are equal."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]


Table = Sequence[Same]


def to_theirs(table: Table, ours: Mapping[str, Tensor], shapes: Shapes) -> State:
    """Our weights under their names; `shapes` are those of their tensors."""
    return _moved([(row.ours, row.theirs) for row in table], ours, shapes)


def to_ours(table: Table, theirs: Mapping[str, Tensor], shapes: Shapes) -> State:
    """Their weights under our names; `shapes` are those of our tensors."""
    return _moved([(row.theirs, row.ours) for row in table], theirs, shapes)


def _moved(
    rows: Sequence[tuple[tuple[str, ...], tuple[str, ...]]], source: Mapping[str, Tensor], shapes: Shapes
) -> State:
    moved: State = {}
    for sources, targets in rows:
        joined = torch.cat([source[name].reshape(-1) for name in sources])
        pieces = torch.split(joined, [torch.Size(shapes[name]).numel() for name in targets])
        moved |= {name: piece.view(tuple(shapes[name])) for name, piece in zip(targets, pieces, strict=True)}
    return moved


def one(ours: str, theirs: str) -> list[Same]:
    """One tensor of each side."""
    return [Same((ours,), (theirs,))]


def affine(ours: str, theirs: str, parts: Sequence[str] = ("weight", "bias")) -> list[Same]:
    """A norm or linear layer under its two names."""
    return [Same((f"{ours}.{part}",), (f"{theirs}.{part}",)) for part in parts]


@dataclass(frozen=True)
class BlockNames:
    """What an encoder of transformers calls the parts of a pre-norm block."""

    blocks: str
    """Where the blocks stand, e.g. "encoder.layers"."""
    attention: str
    """Holds q_proj, k_proj and v_proj."""
    out_proj: str
    norm1: str
    norm2: str


def block_rows(ours: str, theirs: str, depth: int, names: BlockNames) -> list[Same]:
    """The blocks of a native tower under the prefix `ours`, and of an encoder under the prefix `theirs`."""
    rows: list[Same] = []
    for number in range(depth):
        own, other = f"{ours}transformer.blocks.{number}", f"{theirs}{names.blocks}.{number}"
        for part in ("weight", "bias"):
            three = tuple(f"{other}.{names.attention}.{each}_proj.{part}" for each in "qkv")
            rows.append(Same((f"{own}.attention.in_proj.{part}",), three))
        rows += affine(f"{own}.attention.out_proj", f"{other}.{names.out_proj}")
        rows += affine(f"{own}.norm1", f"{other}.{names.norm1}") + affine(f"{own}.norm2", f"{other}.{names.norm2}")
        rows += affine(f"{own}.mlp.fc1", f"{other}.mlp.fc1") + affine(f"{own}.mlp.fc2", f"{other}.mlp.fc2")
    return rows


def activation_of(hidden_act: str) -> Activation | None:
    """Our name of transformers' activation; None for one we do not have."""
    return {theirs: ours for ours, theirs in HIDDEN_ACT.items()}.get(hidden_act)
