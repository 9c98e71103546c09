"""Any encoder that transformers' `AutoModel` builds, as a tower: BERT, ViT, CLIP, VideoMAE, AST, Wav2Vec2 and the like.

Enter: a local folder or hub name. Leave: its last hidden states and a pooled vector. Refused: an architecture without
a sequence of tokens, an input size it has no positions for. Of a dual model (CLIP, SigLIP, CLAP) the half is taken that
reads the tower's modality. Nothing is left to chance: what is random about a row follows from its key alone.
"""

from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.padding import filled_columns
from mmpretrain.layers.parameters import WordEmbedding
from mmpretrain.layers.pixels import CLIP_MEAN, CLIP_STD
from mmpretrain.layers.pooling import masked_mean
from mmpretrain.models.hf_encoders import (
    HALVES,
    adopt_words,
    build_encoder,
    half_config,
    load_encoder,
    outline,
    read_config,
    without_chance,
)
from mmpretrain.models.hf_inputs import (
    Channels,
    EncoderInputs,
    PixelInputs,
    WordInputs,
    check_length,
    ignores_padding,
    is_causal,
    pixel_shape,
    read_statistics,
)
from mmpretrain.models.hf_sound import SoundConfig, build_sound, read_sound, sound_field
from mmpretrain.models.towers.base import Tower, TowerConfig
from mmpretrain.objectives.base import TowerFacts


class HFAutoTowerConfig(TowerConfig):
    """An encoder of the transformers library."""

    kind: Literal["hf_auto"] = "hf_auto"
    name: str
    """Local folder or hub name; remote code is never run."""
    pretrained: bool = True
    """Start from the weights found there; false: only the architecture, freshly initialised, and any batch norm with
    mean 0 and variance 1."""
    pooling: Literal["class", "mean", "pooler"] = "class"
    """class: the first token; mean: over the tokens that count; pooler: the model's own pooled output."""
    context_length: int = Field(64, gt=0)
    """Tokens per text, padding included (text towers)."""
    attend_padding: bool = False
    """Padding counts as tokens, as in SigLIP's text tower."""
    mean: Channels | None = None
    """Mean of the pixels / 255, per channel (images, videos); null: from preprocessor_config.json."""
    std: Channels | None = None
    """Standard deviation of the pixels / 255, per channel (images, videos); null: from preprocessor_config.json."""
    seconds: float | None = Field(None, gt=0)
    """Length of the recordings, for audio towers that read waveforms; null: 10. Spectrograms fix theirs."""
    sound: SoundConfig | None = None
    """How samples become what an audio tower reads; null: from preprocessor_config.json."""
    architecture: dict[str, Any] | None = None
    """The encoder's own config; null: read from `name`, and then kept with the model."""
    mask_id: int | None = None
    """Id of the mask token; null: the tokenizer's."""
    special_ids: tuple[int, ...] | None = None
    """Ids that are never masked nor predicted; null: the tokenizer's."""

    def check(self, modality: str) -> None:
        if modality not in HALVES:
            raise ValueError(f"a tower of kind hf_auto reads {', '.join(HALVES)}, not {modality!r}")

    def reads_elsewhere(self, modality: str) -> bool:
        lacks_pixels = modality in ("image", "video") and (self.mean is None or self.std is None)
        return self.architecture is None or lacks_pixels or (modality == "audio" and self.sound is None)

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        found: dict[str, Any] = {}
        if self.architecture is None:
            found["architecture"] = without_chance(read_config(self.name).to_dict())
        if modality in ("image", "video") and (self.mean is None or self.std is None):
            mean, std = read_statistics(self.name, required=self.pretrained)
            found |= {"mean": self.mean or mean, "std": self.std or std}
        if modality == "audio" and self.sound is None:
            found["sound"] = read_sound(self.name, self.encoder_config(modality), required=self.pretrained)
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
            return read_config(self.name)
        config: PretrainedConfig = AutoConfig.for_model(**self.architecture)
        return config

    def encoder_config(self, modality: str) -> PretrainedConfig:
        """The config of what reads the modality: of a dual model its half."""
        return half_config(self.whole_config(), modality)

    def input_field(self, modality: str) -> FieldSpec:
        if modality == "text":
            return FieldSpec((self.context_length,), "int64")
        if modality == "audio":
            sound = self.sound or read_sound(self.name, self.encoder_config(modality), required=self.pretrained)
            return sound_field(sound, self.seconds)
        return FieldSpec(pixel_shape(self.encoder_config(modality), modality, self.name), "uint8")

    def build(self, modality: str) -> "HFAutoTower":
        return HFAutoTower(self.resolve(modality, None), modality)


class HFAutoTower(Tower):
    """Wraps the encoder; the word embeddings are ours, with the same weight, so that a tied head can score."""

    def __init__(self, config: HFAutoTowerConfig, modality: str) -> None:
        super().__init__()
        self.config, self.modality = config, modality
        pattern = outline(config.whole_config(), modality)
        self.inputs = _inputs(config, pattern, modality)
        self._facts = _measure(config, pattern, self.inputs, modality)
        self.sees_padding = modality != "text" or config.attend_padding or not _measured_alike(config, pattern)
        self.model = build_encoder(pattern)
        if modality == "text":
            adopt_words(self.model)

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        if keep is not None:
            raise ConfigError("a tower of kind hf_auto cannot leave tokens out; masked autoencoding needs kind native")
        outputs = self.model(**self.inputs(inputs, mask))
        tokens, mask = _as_sequence(outputs.last_hidden_state), self.inputs.token_mask(mask)
        pooled = outputs.pooler_output if self.config.pooling == "pooler" else self._pool(tokens, mask)
        return {"tokens": tokens, "pooled": pooled} | ({} if mask is None else {"mask": mask})

    def columns(self, inputs: Tensor, mask: Tensor) -> int:
        return inputs.shape[1] if self.sees_padding else filled_columns(mask)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.config.pooling == "class":
            return tokens[:, 0]
        return masked_mean(tokens[:, self._facts.num_prefix :], mask)

    def facts(self) -> TowerFacts:
        return self._facts

    def load_pretrained(self) -> None:
        if self.config.pretrained:
            load_encoder(self.model, self.config.name, self.config.whole_config(), self.modality)

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        words = self.model.get_input_embeddings()
        return words(hidden, score=True) if isinstance(words, WordEmbedding) else super().vocabulary_logits(hidden)


def _measured_alike(config: HFAutoTowerConfig, pattern: PreTrainedModel) -> bool:
    return ignores_padding(pattern, config.context_length, config.pooling == "pooler")


def _inputs(config: HFAutoTowerConfig, pattern: PreTrainedModel, modality: str) -> EncoderInputs:
    field = config.input_field(modality)
    if modality == "text":
        check_length(pattern, config.context_length, config.name)
        return WordInputs(config.context_length, config.attend_padding)
    if modality == "audio":
        assert config.sound is not None, "a resolved config knows how its sound is prepared"
        return build_sound(config.sound, pattern.main_input_name, pattern.config, field.shape[0])
    return PixelInputs(pattern, field.shape, config.mean or CLIP_MEAN, config.std or CLIP_STD)


def _as_sequence(hidden: Tensor) -> Tensor:
    """Hidden states [B, L, D], or a feature map [B, D, ...] whose places become tokens."""
    return hidden if hidden.dim() == 3 else hidden.flatten(2).transpose(1, 2)


def _measure(config: HFAutoTowerConfig, pattern: PreTrainedModel, inputs: EncoderInputs, modality: str) -> TowerFacts:
    """Run the encoder once, without memory or arithmetic where that can be, and look at what comes out."""
    outputs = inputs.measure(pattern)
    found = outputs["last_hidden_state"]
    if found.dim() < 3:
        raise ConfigError(f"{config.name} gives hidden states of shape {list(found.shape)}, not a sequence of tokens")
    if config.pooling == "pooler" and outputs.get("pooler_output") is None:
        raise ConfigError(f"{config.name} has no pooled output of its own; set the tower's pooling to class or mean")
    tokens = _as_sequence(found)
    content = inputs.content(tokens.shape[1])
    if config.pooling == "class" and modality != "text" and content == tokens.shape[1]:
        raise ConfigError(
            f"{config.name} puts no class token before its {content} tokens; set the tower's pooling to mean"
        )
    causal = modality == "text" and is_causal(pattern)
    if config.pooling == "class" and causal:
        raise ConfigError(
            f"the first token of {config.name} sees none of the words behind it; set the tower's pooling to "
            f"{'mean' if outputs.get('pooler_output') is None else 'mean or pooler'}"
        )
    return TowerFacts(
        width=tokens.shape[2],
        num_tokens=content,
        num_prefix=tokens.shape[1] - content,
        vocab_size=pattern.config.vocab_size if modality == "text" else None,
        special_ids=config.special_ids or (),
        mask_id=config.mask_id,
        causal=causal,
    )
