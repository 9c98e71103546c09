"""Any encoder that transformers' `AutoModel` builds, as a tower: BERT, ViT, CLIP, SigLIP and their like.

Enter: a local folder or hub name. Leave: its last hidden states and a pooled vector. Refused: an architecture without
a sequence of tokens, an input size it has no positions for. Of a dual model (CLIP, SigLIP) the half is taken that
reads the tower's modality. Dropout is off: what is random about a row follows from its key alone.
"""

import copy
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.parameters import WordEmbedding
from mmpretrain.layers.pixels import CLIP_MEAN, CLIP_STD, Normalise
from mmpretrain.layers.pooling import masked_mean
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.objectives.base import TowerFacts

_HALVES = {"image": "vision", "text": "text"}


class HFAutoTowerConfig(TowerConfig):
    """An encoder of the transformers library."""

    kind: Literal["hf_auto"] = "hf_auto"
    name: str
    """Local folder or hub name; remote code is never run."""
    pretrained: bool = True
    """Start from the weights found there; false: only the architecture, freshly initialised."""
    pooling: Literal["class", "mean", "pooler"] = "class"
    """class: the first token; mean: over the tokens that count; pooler: the model's own pooled output."""
    context_length: int = Field(64, gt=0)
    """Tokens per text, padding included (text towers)."""
    attend_padding: bool = False
    """Padding counts as tokens, as in SigLIP's text tower."""
    mean: tuple[float, float, float] | None = None
    """Mean of the pixels / 255, per channel; null: from preprocessor_config.json."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the pixels / 255, per channel; null: from preprocessor_config.json."""
    architecture: dict[str, Any] | None = None
    """The encoder's own config; null: read from `name`, and then kept with the model."""
    mask_id: int | None = None
    """Id of the mask token; null: the tokenizer's."""
    special_ids: tuple[int, ...] | None = None
    """Ids that are never masked nor predicted; null: the tokenizer's."""

    def check(self, modality: str) -> None:
        if modality not in _HALVES:
            raise ValueError(f"a tower of kind hf_auto reads {' or '.join(_HALVES)}, not {modality!r}")

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        found: dict[str, Any] = {}
        if self.architecture is None:
            found["architecture"] = _without_dropout(_read_config(self.name).to_dict())
        if modality == "image" and (self.mean is None or self.std is None):
            mean, std = _read_normalisation(self.name, required=self.pretrained)
            found |= {"mean": self.mean or mean, "std": self.std or std}
        if modality == "text" and tokenizer is not None:
            found |= self._words(tokenizer)
        return self.model_copy(update=found)

    def _words(self, tokenizer: TokenizerFacts) -> dict[str, Any]:
        embedded = self.encoder_config("text").vocab_size
        if tokenizer.vocab_size > embedded:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and {self.name} embeds {embedded}; "
                f"set data.tokenizer.path to {self.name}, the tokenizer of these weights"
            )
        asked = {"mask_id": self.mask_id, "special_ids": self.special_ids}
        given = {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids}
        return {key: given[key] if value is None else value for key, value in asked.items()}

    def whole_config(self) -> PretrainedConfig:
        """The config of all that `name` holds, from what was resolved or else read there."""
        if self.architecture is None:
            return _read_config(self.name)
        config: PretrainedConfig = AutoConfig.for_model(**self.architecture)
        return config

    def encoder_config(self, modality: str) -> PretrainedConfig:
        """The config of what reads the modality: of a dual model its half."""
        whole = self.whole_config()
        if not _is_dual(whole):
            return whole
        half: PretrainedConfig = whole.vision_config if modality == "image" else whole.text_config
        return half

    def input_field(self, modality: str) -> FieldSpec:
        if modality == "text":
            return FieldSpec((self.context_length,), "int64")
        size = self.encoder_config(modality).image_size
        height, width = (size, size) if isinstance(size, int) else size
        return FieldSpec((3, height, width), "uint8")

    def build(self, modality: str) -> "HFAutoTower":
        return HFAutoTower(self.resolve(modality, None), modality)


class HFAutoTower(Tower):
    """Wraps the encoder; the word embeddings are ours, with the same weight, so that a tied head can score."""

    def __init__(self, config: HFAutoTowerConfig, modality: str) -> None:
        super().__init__()
        self.config, self.modality = config, modality
        outline = _outline(config.whole_config(), modality)
        self._facts = _measure(config, outline, modality)
        self.model: PreTrainedModel = type(outline)(outline.config)
        if modality == "text":
            _adopt_words(self.model)
            self.normalise = None
        else:
            self.normalise = Normalise(config.mean or CLIP_MEAN, config.std or CLIP_STD)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        if keep is not None:
            raise ConfigError("a tower of kind hf_auto cannot leave tokens out; masked autoencoding needs kind native")
        if self.normalise is None:
            seen = None if self.config.attend_padding else mask
            outputs = self.model(input_ids=inputs, attention_mask=None if seen is None else seen.long())
        else:
            outputs = self.model(pixel_values=self.normalise(inputs.movedim(1, -1)).movedim(-1, 1))
        tokens: Tensor = outputs.last_hidden_state
        pooled = outputs.pooler_output if self.config.pooling == "pooler" else self._pool(tokens, mask)
        return {"tokens": tokens, "pooled": pooled} | ({} if mask is None else {"mask": mask})

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.config.pooling == "class":
            return tokens[:, 0]
        return masked_mean(tokens[:, self._facts.num_prefix :], mask)

    def facts(self) -> TowerFacts:
        return self._facts

    def load_pretrained(self) -> None:
        if self.config.pretrained:
            whole = AutoModel.from_pretrained(self.config.name, trust_remote_code=False, dtype=torch.float32)
            self.model.load_state_dict(encoder_of(whole, self.modality).state_dict())

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        words = self.model.get_input_embeddings()
        return words(hidden, score=True) if isinstance(words, WordEmbedding) else super().vocabulary_logits(hidden)


def _read_config(name: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tower name {name!r} is neither a folder with a config.json nor a reachable hub name of a known "
            f"architecture ({error})"
        ) from error
    return config


def _is_dual(config: PretrainedConfig) -> bool:
    return {"vision_config", "text_config"} <= set(config.sub_configs)


def encoder_of(model: PreTrainedModel, modality: str) -> PreTrainedModel:
    """What reads the modality: of a dual model its half."""
    if not _is_dual(model.config):
        return model
    return cast(PreTrainedModel, model.get_submodule(f"{_HALVES[modality]}_model"))


def _outline(config: PretrainedConfig, modality: str) -> PreTrainedModel:
    """The encoder without memory (meta device); halves of dual models are known to transformers only this way."""
    with torch.device("meta"):
        whole = AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    return encoder_of(whole, modality)


def _without_dropout(fields: dict[str, Any]) -> dict[str, Any]:
    """The same config with every rate of dropout, drop path or layer drop at zero."""
    still: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            still[key] = _without_dropout(value)
        elif isinstance(value, float) and any(word in key for word in ("dropout", "drop_path", "layerdrop")):
            still[key] = 0.0
        else:
            still[key] = value
    return still


_Channels = tuple[float, float, float]


def _read_normalisation(name: str, required: bool) -> tuple[_Channels, _Channels]:
    """Mean and std the weights were trained with."""
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(name)
        return cast(_Channels, tuple(fields["image_mean"])), cast(_Channels, tuple(fields["image_std"]))
    except (OSError, KeyError) as error:
        if not required:
            return CLIP_MEAN, CLIP_STD
        raise ConfigError(
            f"{name} does not say how its pixels are normalised (image_mean, image_std in preprocessor_config.json); "
            "set the tower's mean and std"
        ) from error


def _adopt_words(model: PreTrainedModel) -> None:
    """Put our word embedding in the place of the model's, around the same weight."""
    theirs = cast(nn.Embedding, model.get_input_embeddings())
    ours = WordEmbedding(theirs.num_embeddings, theirs.embedding_dim, theirs.padding_idx, device="meta")
    ours.weight = theirs.weight
    model.set_input_embeddings(ours)


def _measure(config: HFAutoTowerConfig, outline: PreTrainedModel, modality: str) -> TowerFacts:
    """Run the encoder once without memory or arithmetic and look at what comes out."""
    shape = config.input_field(modality).shape
    if modality == "text":
        _check_context(config, outline.config)
        outputs = outline(input_ids=torch.zeros(1, *shape, dtype=torch.int64, device="meta"))
    else:
        outputs = outline(pixel_values=torch.zeros(1, *shape, device="meta"))
    tokens = outputs.last_hidden_state
    if tokens.dim() != 3:
        raise ConfigError(f"{config.name} gives hidden states of shape {list(tokens.shape)}, not a sequence of tokens")
    if config.pooling == "pooler" and outputs.get("pooler_output") is None:
        raise ConfigError(f"{config.name} has no pooled output of its own; set the tower's pooling to class or mean")
    content = shape[0] if modality == "text" else (shape[1] // outline.config.patch_size) ** 2
    return TowerFacts(
        width=tokens.shape[2],
        num_tokens=content,
        num_prefix=tokens.shape[1] - content,
        vocab_size=outline.config.vocab_size if modality == "text" else None,
        special_ids=config.special_ids or (),
        mask_id=config.mask_id,
        causal=modality == "text" and _is_causal(outline),
    )


@torch.no_grad()
def _is_causal(outline: PreTrainedModel) -> bool:
    """Whether a token sees only earlier ones, measured on one fresh layer: no attribute tells it of all encoders."""
    config = copy.deepcopy(outline.config)
    config.num_hidden_layers = 1
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        probe: nn.Module = type(outline)(config).train(False)
        rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
        first, second = probe(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state[:, 0]
    return torch.allclose(first, second, rtol=0, atol=1e-6)


def _check_context(config: HFAutoTowerConfig, encoder_config: PretrainedConfig) -> None:
    longest = encoder_config.max_position_embeddings
    if config.context_length > longest:
        raise ConfigError(
            f"context_length {config.context_length} is longer than the {longest} positions of {config.name}; "
            f"set context_length to {longest} or less"
        )
