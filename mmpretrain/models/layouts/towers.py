"""What the native readings of transformers' configs share.

Enter: the config of an encoder, how its pixels are normalised. Leave: fields of a native tower.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from mmpretrain.core.errors import CheckpointError
from mmpretrain.models.layouts.tables import HIDDEN_ACT, activation_of

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Pixels:
    """Mean and std of the pixels / 255 that an encoder was trained on."""

    mean: Channels
    std: Channels

    def stem(self, image_size: int, patch_size: int) -> dict[str, object]:
        """Fields of the patch stem that reads these pixels."""
        sizes = {"image_size": image_size, "patch_size": patch_size}
        return {"kind": "patches", "mean": self.mean, "std": self.std, **sizes}


HALVES = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""From -1 to 1, as ViT and SigLIP were published."""


def native_tower(config: PretrainedConfig) -> dict[str, object]:
    """Fields that every encoder has; refuses an activation that native towers lack."""
    activation = activation_of(config.hidden_act)
    if activation is None:
        raise CheckpointError(
            f"its activation {config.hidden_act} is none of native towers' ({', '.join(HIDDEN_ACT.values())}); give "
            "the model a tower of kind hf_auto"
        )
    return {
        "kind": "native",
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "activation": activation,
        "norm_eps": config.layer_norm_eps,
    }


def words_stem(config: PretrainedConfig, eos_id: int | None) -> dict[str, object]:
    """Fields of the stem over the words of a text encoder."""
    return {
        "kind": "embeddings",
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "eos_id": eos_id,
    }
