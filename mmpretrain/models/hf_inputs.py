"""What encoders of transformers are given: words, pixels of images and videos.

Enter: batch fields. Leave: the keyword arguments of an encoder's forward. Refused: texts longer than an encoder has
positions for, videos of an encoder that does not say how many frames it reads. Legend: B rows, T frames, S pixels,
L tokens.
"""

import copy
import math
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.padding import MULTIPLE
from mmpretrain.layers.pixels import CLIP_MEAN, CLIP_STD, Normalise

Channels = tuple[float, float, float]


class EncoderInputs(nn.Module):
    """From batch fields to what an encoder is called with."""

    def forward(self, inputs: Tensor, mask: Tensor | None) -> TensorDict:
        """Map inputs, and their mask as the batch holds it, to keyword arguments."""
        raise NotImplementedError

    def measure(self, pattern: PreTrainedModel) -> BaseModelOutputWithPooling:
        """What an encoder like this outline gives for one row: shapes count, values do not."""
        outputs: BaseModelOutputWithPooling = pattern(**self.example())
        return outputs

    def example(self) -> TensorDict:
        """Keyword arguments of one row on the meta device."""
        raise NotImplementedError

    def content(self, found: int) -> int:
        """How many of the tokens that were found stand for content; the others come before them."""
        return found

    def token_mask(self, mask: Tensor | None) -> Tensor | None:
        """The mask of the tokens, bool [B, L], True where one counts; None where all do."""
        return None


class WordInputs(EncoderInputs):
    """Ids as they are, and which of them are padding."""

    def __init__(self, length: int, attend_padding: bool) -> None:
        super().__init__()
        self.length, self.attend_padding = length, attend_padding

    def forward(self, inputs: Tensor, mask: Tensor | None) -> TensorDict:
        if mask is None or self.attend_padding:
            return {"input_ids": inputs}
        return {"input_ids": inputs, "attention_mask": mask.long()}

    def measure(self, pattern: PreTrainedModel) -> BaseModelOutputWithPooling:
        """Of one layer on the CPU: encoders of words look at the values of their masks."""
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            ids = torch.full((1, self.length), 5)
            outputs: BaseModelOutputWithPooling = one_layer(pattern)(input_ids=ids, attention_mask=torch.ones_like(ids))
        return outputs

    def content(self, found: int) -> int:
        return self.length

    def token_mask(self, mask: Tensor | None) -> Tensor | None:
        return mask


class PixelInputs(EncoderInputs):
    """Normalised pixels of images [B, 3, S, S] or clips [B, T, 3, S, S], in the same order."""

    def __init__(self, encoder: PreTrainedModel, shape: tuple[int, ...], mean: Channels, std: Channels) -> None:
        super().__init__()
        self.name, self.shape = encoder.main_input_name, shape
        self.grid = _grid(encoder.config, shape)
        self.normalise = Normalise(mean, std)

    def forward(self, inputs: Tensor, mask: Tensor | None) -> TensorDict:
        return {self.name: self.normalise(inputs.movedim(-3, -1)).movedim(-1, -3)}

    def example(self) -> TensorDict:
        return {self.name: torch.zeros(1, *self.shape, device="meta")}

    def content(self, found: int) -> int:
        """An encoder that merges patches as it goes has fewer tokens than patches, and all are content."""
        return min(found, math.prod(self.grid)) if self.grid else found


def pixel_shape(config: PretrainedConfig, modality: str, name: str) -> tuple[int, ...]:
    """The shape of the images or clips an encoder reads."""
    fields = config.to_dict()
    size = fields.get("image_size", fields.get("crop_size"))
    if size is None:
        raise ConfigError(f"{name} does not say the size of its images (image_size in config.json)")
    height, width = (size, size) if isinstance(size, int) else size
    if modality == "image":
        return (3, height, width)
    if "num_frames" not in fields:
        raise ConfigError(
            f"{name} reads images and no videos (no num_frames in config.json); put it into a tower of kind frames"
        )
    return (fields["num_frames"], 3, height, width)


def read_statistics(name: str, required: bool) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the pixels that the weights were trained with."""
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return cast(Channels, tuple(fields["image_mean"])), cast(Channels, tuple(fields["image_std"]))
    except (OSError, KeyError) as error:
        if not required:
            return CLIP_MEAN, CLIP_STD
        raise ConfigError(
            f"{name} does not say how its pixels are normalised (image_mean, image_std in preprocessor_config.json); "
            "set the tower's mean and std"
        ) from error


def one_layer(pattern: PreTrainedModel) -> nn.Module:
    """A fresh encoder like the outline, but of a single layer, not training."""
    config = copy.deepcopy(pattern.config)
    config.num_hidden_layers = 1
    encoder: nn.Module = type(pattern)(config)
    return encoder.train(False)


@torch.no_grad()
def is_causal(pattern: PreTrainedModel) -> bool:
    """Whether a token sees only earlier ones, measured on one fresh layer: no attribute tells it of all encoders."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
        first, second = one_layer(pattern)(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state[:, 0]
    return torch.allclose(first, second, rtol=0, atol=1e-6)


@torch.no_grad()
def ignores_padding(pattern: PreTrainedModel, length: int, pooled: bool) -> bool:
    """Whether further columns of padding change nothing of what is said of words, and of the model's own pooled output
    where that is `pooled`; measured on one fresh layer, for encoders that mix or count whole rows do not tell."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        layer, mask = one_layer(pattern), (torch.arange(length) < 4)[None].long()
        ids = torch.where(mask.bool(), torch.arange(5, 5 + length), pattern.config.pad_token_id or 0)
        cuts = [layer(input_ids=ids[:, :n], attention_mask=mask[:, :n]) for n in (length, min(length, MULTIPLE))]
    told = [[cut.last_hidden_state[:, :4], *((cut.pooler_output,) if pooled else ())] for cut in cuts]
    return all(torch.allclose(whole, short, rtol=0, atol=1e-5) for whole, short in zip(*told, strict=True))


def check_length(encoder: PreTrainedModel, length: int, name: str) -> None:
    """Refuse texts of more tokens than the encoder has positions, where it has any (T5 measures distances)."""
    positions = getattr(encoder.config, "max_position_embeddings", None) or -1  # XLNet says -1
    longest = positions - _reserved_positions(encoder)
    if 0 < longest < length:
        raise ConfigError(
            f"context_length {length} is longer than the {longest} positions of {name}; "
            f"set context_length to {longest} or less"
        )


def _reserved_positions(encoder: PreTrainedModel) -> int:
    """RoBERTa and its like count positions from behind the id of padding."""
    tables = (m for name, m in encoder.named_modules() if name.endswith("position_embeddings"))
    found = (m.padding_idx for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None)
    return max((padding + 1 for padding in found), default=0)


def _grid(config: PretrainedConfig, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each axis; empty for an encoder without patches."""
    fields = config.to_dict()
    patch = fields.get("tubelet_size") if isinstance(fields.get("tubelet_size"), list) else fields.get("patch_size")
    if patch is None:
        return ()
    *depth, height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    space = (shape[-2] // height, shape[-1] // width)
    if len(shape) == 3:
        return space
    return (shape[0] // (depth[0] if depth else fields.get("tubelet_size", 1)), *space)
