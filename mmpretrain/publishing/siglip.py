"""A native pair as transformers' `SiglipModel`.

Enter: a dual encoder. Leave: its config and state dict, or the reasons why the layout cannot hold it.
The layout itself, which starting from published weights reads too, stands in `models/layouts/siglip.py`.
"""

from transformers import SiglipConfig, SiglipModel

from mmpretrain.models.config import ModelConfig
from mmpretrain.models.layouts.siglip import LOGITS, siglip_table
from mmpretrain.models.layouts.tables import State, to_theirs
from mmpretrain.publishing.clip import shapes_of, tower_config
from mmpretrain.publishing.dual_encoder import DualEncoder, differences, towers_of


def siglip_obstacles(config: ModelConfig) -> list[str]:
    """Why the model cannot be a SiglipModel; empty when it can."""
    found = towers_of(config)
    if isinstance(found, str):
        return [found]
    image, image_stem, text, _ = found
    return differences(
        {
            "towers.image.pooling": (image.pooling, "map"),
            "towers.image.causal": (image.causal, False),
            "towers.image.pre_norm": (image.pre_norm, False),
            "towers.image.stem.bias": (image_stem.bias, True),
            "towers.image.stem.positions": (image_stem.positions, "learned"),
            "towers.image.projection": (image.projection, False),
            "towers.image.width": (image.width, config.embed_dim),
            "towers.text.pooling": (text.pooling, "last"),
            "towers.text.causal": (text.causal, False),
            "towers.text.attend_padding": (text.attend_padding, True),
            "towers.text.pre_norm": (text.pre_norm, False),
            "towers.text.projection": (text.projection, True),
            "towers.text.projection_bias": (text.projection_bias, True),
        }
    )


def siglip_config(pair: DualEncoder) -> SiglipConfig:
    """The config of the same architecture."""
    return SiglipConfig(
        vision_config={
            **tower_config(pair.image),
            "image_size": pair.image_stem.image_size,
            "patch_size": pair.image_stem.patch_size,
        },
        text_config={
            **tower_config(pair.text),
            "vocab_size": pair.text_stem.vocab_size,
            "max_position_embeddings": pair.text_stem.context_length,
            "projection_size": pair.embed_dim,
            "eos_token_id": pair.text_stem.eos_id,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    )


def siglip_state(pair: DualEncoder) -> State:
    """The weights under SiglipModel's names."""
    table = [*siglip_table(pair.image.depth, pair.text.depth), *LOGITS]
    return to_theirs(table, pair.state, shapes_of(SiglipModel, siglip_config(pair)))
