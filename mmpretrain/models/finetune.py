"""What a fine-tuning run starts from and which of its weights learn, as a part of the run config.

Enter: YAML. Leave: a frozen config; `models/trained_parts.py` and `models/lora.py` act on it. Refused: towers the
model does not have, a tower that is to learn both by its own weights and by adapters.
"""

from collections.abc import Collection, Iterator
from typing import Literal

from pydantic import Field, PositiveInt

from mmpretrain.core.config import Config, Rule

Trained = Literal["whole", "heads", "frozen"] | PositiveInt


class LoRAConfig(Config):
    """Low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685); merged when published."""

    rank: PositiveInt = 8
    """Rank of each adapter."""
    alpha: PositiveInt = 16
    """The adapter's output counts alpha / rank times."""
    targets: tuple[str, ...] | None = Field(None, min_length=1)
    """Linear layers by their names or those of a part around them, e.g. [attention, mlp.fc1]; null: every linear
    layer in a tower's blocks."""
    towers: tuple[str, ...] | None = Field(None, min_length=1)
    """Towers with adapters, their own weights frozen; null: all of them."""


class FinetuneConfig(Config):
    """Fine-tuning: the weights to start from and the ones that learn. Fusion and objectives' heads always do."""

    parent: str | None = None
    """What `mmpretrain finetune --from` names: a run folder, a checkpoint, a published folder, or a folder or hub name
    of transformers. A run that continues reads its own checkpoint instead."""
    train: Trained = "whole"
    """What learns of each tower. whole: everything; a number: its last blocks and what follows them; heads: its
    projection alone; frozen: not even that. What stands before the blocks learns with the whole tower only."""
    towers: dict[str, Trained] = {}
    """The same for single towers, e.g. {image: frozen} to lock the image tower (LiT, arXiv 2111.07991)."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each block learns at this share of the rate of the block after it; what follows the blocks, and all heads, at
    the full rate (BEiT, arXiv 2106.08254, appendix H)."""
    lora: LoRAConfig | None = None
    """Adapters in place of the towers' own weights."""

    def trained(self, tower: str) -> Trained:
        """What learns of a tower's own weights."""
        return "heads" if self.adapts(tower) else self.towers.get(tower, self.train)

    def adapts(self, tower: str) -> bool:
        """Whether the tower learns by adapters."""
        return self.lora is not None and (self.lora.towers is None or tower in self.lora.towers)

    def broken_rules(self) -> Iterator[Rule]:
        if self.lora is None:
            return
        for tower in self.towers:
            if self.adapts(tower):
                yield (
                    ("towers", tower),
                    "the tower has LoRA adapters, which learn in place of its weights; remove it here or name the "
                    "adapted towers in finetune.lora.towers",
                )
        if self.lora.towers is None and self.train != "whole":
            yield ("train",), f"saw {self.train!r}, but every tower has LoRA adapters; remove it or set lora.towers"


def unknown_towers(config: FinetuneConfig, towers: Collection[str]) -> Iterator[Rule]:
    """Rules that need the model's towers; paths begin at the run config."""
    adapted = () if config.lora is None else config.lora.towers or ()
    for path, names in ((("finetune", "towers"), config.towers), (("finetune", "lora", "towers"), adapted)):
        for name in names:
            if name not in towers:
                yield path, f"names the tower {name}, the model has {', '.join(towers)}; remove it or name one of them"
