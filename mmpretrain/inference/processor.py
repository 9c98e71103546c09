"""From what a person hands over to what a model reads: the codecs of a run, without augmentation.

Enter: paths, bytes, images, arrays or texts by modality. Leave: batch fields as training made them. Refused: a modality
without a codec, an input that cannot be used. `AutoProcessor` finds it for published folders once this is imported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor

from mmpretrain.core.errors import CheckpointError, DataError, SampleError
from mmpretrain.core.types import Array, TensorDict
from mmpretrain.evaluation.base import CaptionCodec
from mmpretrain.inference.media import Media, media_members, text_of
from mmpretrain.modalities.base import CodecConfig, Decoder, PresenceCodec
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalConfig
from mmpretrain.publishing.processor import read_codecs

Inputs = Media | Sequence[Media]
"""One input of a modality, or several."""


class Processor:
    """The codecs of the model's inputs."""

    def __init__(self, codecs: Mapping[str, PresenceCodec], configs: Mapping[str, CodecConfig]) -> None:
        """`configs`: those of all the run's codecs, labels included; `codecs`: one for each input of the model."""
        self.codecs, self.configs = codecs, configs

    @classmethod
    def build(cls, model: ModelConfig, configs: Mapping[str, CodecConfig], tokenizer: str | None) -> Self:
        """The codecs that produce what these towers read."""
        inputs = model.inputs
        if missing := sorted(inputs.keys() - configs.keys()):
            raise CheckpointError(
                f"no codec was saved for {', '.join(missing)}, which the model reads; publish it again"
            )
        return cls({name: configs[name].codec(inputs, tokenizer) for name in sorted(inputs)}, configs)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> Self:
        """The processor of a published folder; further arguments are those that `AutoProcessor` adds."""
        path = Path(folder)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, MultimodalConfig):
            raise CheckpointError(f"{path} holds a {config.model_type} model; name a folder that mmpretrain published")
        return cls.build(config.parsed_model(), read_codecs(path), str(path))

    @property
    def text_modality(self) -> str | None:
        """The modality that reads texts, if any; the one of that name where several do."""
        texts = [name for name, codec in self.codecs.items() if isinstance(codec.decoder, CaptionCodec)]
        return "text" if "text" in texts else next(iter(texts), None)

    def __call__(self, **inputs: Inputs) -> TensorDict:
        """Batch fields by name, "text" and "text.mask" say, with as many rows as a modality has inputs."""
        fields: TensorDict = {}
        for modality, given in inputs.items():
            rows = [self._row(modality, number, media) for number, media in enumerate(as_list(given))]
            fields |= stack(rows)
        return fields

    def decoder(self, modality: str) -> Decoder:
        """What decodes a modality; refuses what the model has no tower for."""
        if modality not in self.codecs:
            raise DataError(f"the model has no tower for {modality!r}; it reads {', '.join(self.codecs)}")
        return self.codecs[modality].decoder

    def decode(self, modality: str, media: Media) -> dict[str, Array]:
        """The fields of one input; SampleError says why it cannot be used."""
        decoder = self.decoder(modality)
        if isinstance(decoder, CaptionCodec):
            return {name: rows[0] for name, rows in decoder.encode([text_of(media)]).items()}
        return decoder.decode(media_members(media), None)

    def _row(self, modality: str, number: int, media: Media) -> dict[str, Array]:
        try:
            return self.decode(modality, media)
        except SampleError as error:
            is_text = isinstance(self.decoder(modality), CaptionCodec)
            name = f" ({media})" if isinstance(media, Path) or (isinstance(media, str) and not is_text) else ""
            raise DataError(f"{modality} input {number}{name}: {error}") from error


def as_list(given: Inputs) -> list[Media]:
    """The inputs of one modality: a list holds several, anything else is one."""
    return list(given) if isinstance(given, list) else [given]  # type: ignore[list-item]


def stack(rows: Sequence[Mapping[str, Array]]) -> TensorDict:
    """Rows with the same fields as tensors [rows, ...]."""
    if not rows:
        raise DataError("there are no inputs; give at least one")
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


AutoProcessor.register(MultimodalConfig, Processor)  # type: ignore[no-untyped-call]
