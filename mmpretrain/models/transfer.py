"""A parent's weights put into a new model, and an account of every one of them.

Enter: a freshly built model and its `Parent`. Leave: the model with what fits, positions and kernels made to fit, and a
table of what was loaded, left fresh and left over. Refused: a parent of which nothing fits. A video tower that the
parent lacks starts from its image tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mmpretrain.core.errors import CheckpointError
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.parent import Parent
from mmpretrain.models.places import Places

SHOWN = 4
"""Remarks in a row of the table; the others are counted."""


@dataclass
class Account:
    """What became of the weights of one part of the model, in numbers of values."""

    loaded: int = 0
    fresh: int = 0
    left_over: int = 0
    notes: dict[str, None] = field(default_factory=dict)
    """Remarks in order, each once."""

    def remarks(self) -> str:
        shown = list(self.notes)[:SHOWN]
        return "; ".join([*shown, *([f"and {len(self.notes) - SHOWN} more"] if len(self.notes) > SHOWN else [])])


@dataclass(frozen=True)
class Transfer:
    """What a model took over."""

    parent: Parent
    accounts: Mapping[str, Account]
    """Part of the model, e.g. "towers.image" -> its account."""
    fresh: frozenset[str]
    """Weights of the model that the parent had nothing for."""

    def never_learned(self, model: MultimodalTransformer) -> dict[str, int]:
        """Parts of towers that are fresh and frozen, in numbers of values: what they say stays random."""
        found: dict[str, int] = {}
        for name, weight in model.named_parameters():
            plain = name.replace(".base_layer", "")  # which adapters stand beside
            if not weight.requires_grad and plain in self.fresh and plain.startswith(("towers.", "projections.")):
                found[_part(plain)] = found.get(_part(plain), 0) + weight.numel()
        return found

    def table(self) -> str:
        """The account of every part, one a line, in numbers of values."""
        rows = [("part", "loaded", "fresh", "left over", "remarks")]
        for part, one in sorted(self.accounts.items()):
            rows.append((part, f"{one.loaded:,}", f"{one.fresh:,}", f"{one.left_over:,}", one.remarks()))
        first, *others = (max(len(row[column]) for row in rows) for column in range(4))
        lines = []
        for part, *numbers, remarks in rows:
            cells = [number.rjust(width) for number, width in zip(numbers, others, strict=True)]
            lines.append("  ".join([part.ljust(first), *cells, remarks]).rstrip())
        return "\n".join(lines)


@torch.no_grad()
def take_over(model: MultimodalTransformer, parent: Parent) -> Transfer:
    """Copy what fits from `parent` into `model`, in place."""
    accounts: dict[str, Account] = {}
    places, used, fresh, matrices = Places(model, parent), set[str](), set[str](), 0
    for name, tensor in model.state_dict().items():
        account = accounts.setdefault(_part(name), Account())
        fit = places.find(name, tensor)
        account.notes |= dict.fromkeys(fit.notes)
        if fit.values is None:
            account.fresh += tensor.numel()
            fresh.add(name)
            continue
        tensor.copy_(fit.values)
        used.add(fit.source)
        account.loaded += tensor.numel()
        matrices += tensor.numel() > 1
    for name, tensor in parent.weights.items():
        if name not in used:
            accounts.setdefault(_part(name), Account()).left_over += tensor.numel()
    for name, values in parent.unread.items():
        account = accounts.setdefault(f"({parent.description})", Account())
        account.left_over += values
        account.notes |= {name: None}
    if not matrices:
        raise CheckpointError(_refusal(parent, accounts))
    return Transfer(parent, accounts, frozenset(fresh))


def _part(name: str) -> str:
    """The row of the table that a weight belongs to: "towers.image", "projections.text", "fusion"."""
    first, _, rest = name.partition(".")
    return first if first == "fusion" else f"{first}.{rest.split('.')[0]}".rstrip(".")


def _refusal(parent: Parent, accounts: Mapping[str, Account]) -> str:
    reasons = [f"{part}: {account.remarks()}" for part, account in sorted(accounts.items()) if account.notes]
    held = ", ".join(sorted(parent.towers)) or "none that this model could take"
    return (
        f"--from {parent.source} ({parent.description}, towers: {held}): none of its weights fit this model; "
        f"{'; '.join(reasons) or 'they share no tower, fusion or head'}"
    )
