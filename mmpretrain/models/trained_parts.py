"""Which parameters of a model learn, and each one's share of the learning rate.

Enter: a freshly built model and the `finetune` part of its run. Leave: the model with `requires_grad` set once and for
all, before an engine sees it; a factor per parameter. Refused: more blocks than a tower has, nothing left to learn.
"""

from collections.abc import Iterator

from torch import nn

from mmpretrain.core.errors import ConfigError
from mmpretrain.models.finetune import FinetuneConfig
from mmpretrain.models.lora import MARK, add_adapters
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.base import Tower


def prepare(model: MultimodalTransformer, config: FinetuneConfig) -> None:
    """Add the adapters and freeze what does not learn, in place."""
    add_adapters(model, config)
    never = dict(model.named_parameters()).keys() - model.published_state().keys()
    frozen = {*_frozen(model, config), *never}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if not any(parameter.requires_grad and parameter.numel() > 1 for parameter in model.parameters()):
        raise ConfigError(
            f"finetune: nothing is left to learn; all towers are frozen ({', '.join(model.towers)}) and no objective "
            f"has a head: set finetune.train to whole, heads or a number of blocks"
        )


def learning_rate_shares(model: MultimodalTransformer, config: FinetuneConfig) -> dict[str, float]:
    """Parameter -> its share of the learning rate, for those below the full rate: decay ^ (blocks + 1 - depth)."""
    shares = {}
    for modality, tower in model.towers.items():
        behind = len(tower.blocks()) + 1
        for name, depth in depths(tower).items():
            if depth < behind and config.layer_decay < 1:
                shares[f"towers.{modality}.{name}"] = config.layer_decay ** (behind - depth)
    return shares


def depths(tower: Tower) -> dict[str, int]:
    """Parameter of a tower -> the number of its block, counted from 1; 0 before the blocks, their number + 1 behind.

    Modules are registered in the order in which tokens pass them, so what stands between two blocks goes with the
    second.
    """
    blocks = tower.blocks()
    block_of = {id(p): number for number, block in enumerate(blocks, start=1) for p in block.parameters()}
    found, reached = {}, 0
    for name, parameter in tower.named_parameters():
        depth = block_of.get(id(parameter), reached + 1 if reached else 0)
        reached = max(reached, block_of.get(id(parameter), 0))
        found[name] = depth
    return found


def _frozen(model: MultimodalTransformer, config: FinetuneConfig) -> Iterator[str]:
    for modality, tower in model.towers.items():
        trained = config.trained(modality)
        if trained == "whole":
            continue
        prefix = f"towers.{modality}"
        first = len(tower.blocks()) + 2 if isinstance(trained, str) else _first_block(modality, tower, trained)
        names = [name for name, depth in depths(tower).items() if depth < first]
        yield from (f"{prefix}.{name}" for name in names if MARK not in name)
        if trained == "frozen":
            yield from (f"projections.{modality}.{name}" for name, _ in _projection(model, modality).named_parameters())


def _projection(model: MultimodalTransformer, modality: str) -> nn.Module:
    return model.get_submodule(f"projections.{modality}")


def _first_block(modality: str, tower: Tower, last: int) -> int:
    """Number of the first of the tower's last blocks."""
    blocks = len(tower.blocks())
    if last > blocks:
        raise ConfigError(
            f"finetune: the last {last} blocks of the tower {modality} are to learn and it has {blocks}; name at most "
            f"{blocks}, or whole, e.g. finetune.towers.{modality}={blocks or 'whole'}"
        )
    return blocks + 1 - last
