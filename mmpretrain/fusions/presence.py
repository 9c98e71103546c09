"""What fusions share: who attends to whom, and means over the modalities that a row has.

Enter: streams of tokens and masks, which are True where a token counts; a modality that a row lacks has none that does.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.adapters import joined_mask
from mmpretrain.layers.pooling import masked_mean

Masks = Mapping[str, Tensor | None]


def contexts_of(chosen: Mapping[str, tuple[str, ...]] | None, names: Iterable[str]) -> dict[str, list[str]]:
    """For each modality those it attends to: all others, unless chosen."""
    known = list(names)
    if chosen is None:
        return {m: [other for other in known if other != m] for m in known}
    strangers = sorted(({*chosen} | {other for others in chosen.values() for other in others}) - {*known})
    if strangers or any(m in others for m, others in chosen.items()):
        raise ConfigError(
            f"model.fusion.attend {dict(chosen)} must name towers of the model ({', '.join(known)}), each attending to "
            f"others; {'no tower: ' + ', '.join(strangers) if strangers else 'remove a modality from its own list'}"
        )
    return {m: list(chosen.get(m, ())) for m in known}


def context_mask(tokens: TensorDict, masks: Masks, others: list[str]) -> Tensor | None:
    """Mask of [null token, tokens of the others], or None where all count."""
    mask = joined_mask(tokens, masks, others) if others else None
    return None if mask is None else F.pad(mask, (1, 0), value=True)


def presence(streams: TensorDict, masks: Masks) -> Tensor:
    """bool [B, M]: which modalities each row has, in the order of the streams."""
    first = next(iter(streams.values()))
    present = torch.ones(first.shape[0], len(streams), dtype=torch.bool, device=first.device)
    for column, m in enumerate(streams):
        mask = masks.get(m)
        if mask is not None:
            present[:, column] = mask.any(dim=1)
    return present


def means_of(streams: TensorDict, masks: Masks) -> Tensor:
    """Mean over the tokens that count of each modality, [B, M, D]."""
    return torch.stack([masked_mean(stream, masks.get(m)) for m, stream in streams.items()], dim=1)


def mean_of_present(streams: TensorDict, masks: Masks) -> Tensor:
    """Mean over the modalities a row has of the mean over their tokens, [B, D]; zero for a row with none."""
    return masked_mean(means_of(streams, masks), presence(streams, masks))
