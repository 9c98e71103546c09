"""A fixed input and what the trained model answers to it: the reference every published layout is held against.

Enter: a loaded model. Leave: `probe.safetensors` with each input ("image", "text", "text.mask") and embeddings
("embedding.image", ...), fp32. The inputs depend on the towers' shapes alone.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.modalities.text import EmbeddingsStemConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.native import NativeTowerConfig

FILE = "probe.safetensors"
ROWS = 4
SEED = 20210226
_SAMPLES = {"uint8": torch.uint8, "int16": torch.int16}
"""Pixels and sound, of which any value can be met."""


def write_probe(model: MultimodalTransformer, folder: Path) -> None:
    """Embed the fixed inputs with the model at hand and save both."""
    inputs = probe_inputs(model.config.parsed_model(), {m: f.vocab_size for m, f in model.facts.towers.items()})
    modalities = model.facts.towers
    answers = {f"embedding.{modality}": embed(model, modality, inputs) for modality in modalities}
    save_file({**inputs, **answers}, folder / FILE)


def read_probe(folder: Path) -> TensorDict:
    """The inputs and embeddings of a published folder."""
    return dict(load_file(folder / FILE))


def embed(model: MultimodalTransformer, modality: str, inputs: TensorDict) -> Tensor:
    """Embeddings of the probe's inputs in fp32, as a user of the published model computes them."""
    was_training = model.training
    model.train(False)
    with torch.no_grad():
        vectors = model.embed(modality, inputs[modality], inputs.get(f"{modality}.mask")).float().contiguous()
    model.train(was_training)
    return vectors


def probe_inputs(config: ModelConfig, vocabulary: dict[str, int | None]) -> TensorDict:
    """Noise of the inputs' shapes: whole numbers for pixels and sound, ids with an end token and padding for text."""
    generator = torch.Generator().manual_seed(SEED)
    inputs: TensorDict = {}
    for modality, spec in sorted(config.inputs.items()):
        if spec.dtype == "int64":
            inputs |= _texts(modality, spec, vocabulary[modality], _eos_id(config, modality), generator)
        elif spec.dtype in _SAMPLES:
            dtype, size = _SAMPLES[spec.dtype], (ROWS, *spec.shape)
            low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            inputs[modality] = torch.randint(low, high + 1, size, dtype=dtype, generator=generator)
        else:
            inputs[modality] = torch.randn(ROWS, *spec.shape, generator=generator)
    return inputs


def _texts(
    modality: str, spec: FieldSpec, vocab_size: int | None, eos_id: int | None, generator: torch.Generator
) -> TensorDict:
    if vocab_size is None:
        raise ConfigError(f"the tower of {modality!r} reads ids but has no vocabulary")
    (length,) = spec.shape
    counts = torch.linspace(2, length, ROWS).long()
    mask = torch.arange(length)[None, :] < counts[:, None]
    ids = torch.randint(1, max(vocab_size - 1, 2), (ROWS, length), generator=generator)
    ids[torch.arange(ROWS), counts - 1] = eos_id if eos_id is not None else vocab_size - 1
    return {modality: ids.masked_fill(~mask, 0), f"{modality}.mask": mask}


def _eos_id(config: ModelConfig, modality: str) -> int | None:
    tower = config.towers[config.readers[modality]]
    if isinstance(tower, NativeTowerConfig) and isinstance(tower.stem, EmbeddingsStemConfig):
        return tower.stem.eos_id
    return None
