"""Low-rank adapters in the towers, by the peft library.

Enter: a model and the adapters' config. Leave: the model with adapters beside its linear layers, at first without
effect; or, merged, without them. Refused: targets that name no linear layer, and any adapters where peft is
not installed; it is imported only here.
"""

import re

from torch import nn

from mmpretrain.core.containers import require
from mmpretrain.core.errors import ConfigError
from mmpretrain.models.finetune import FinetuneConfig, LoRAConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.base import Tower

MARK = "lora_"
"""Stands in the name of every parameter of an adapter, and of no other."""


def add_adapters(model: MultimodalTransformer, config: FinetuneConfig) -> None:
    """Put adapters into the towers that have them, in place; the new weights are drawn from torch's generator."""
    if config.lora is None:
        return
    require("peft", "lora", "finetune.lora")
    from peft import LoraConfig, inject_adapter_in_model

    for modality, tower in model.towers_by_modality().items():
        if config.adapts(modality):
            names = _targets(tower, modality, config.lora)
            pattern = "|".join(re.escape(name) for name in names)
            adapters = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=pattern)
            inject_adapter_in_model(adapters, tower)


def merge_adapters(model: nn.Module) -> None:
    """Add each adapter's product to the weight beside it and take the adapter out, in place: W + alpha / rank B A."""
    if not any(MARK in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        module.merge()
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, module.get_base_layer())


def _targets(tower: Tower, modality: str, config: LoRAConfig) -> list[str]:
    """Names, within the tower, of the linear layers to adapt."""
    linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
    if config.targets is None:
        inside = {id(module) for block in tower.blocks() for module in block.modules()}
        found = [name for name in linear if id(tower.get_submodule(name)) in inside]
        if not found:
            raise ConfigError(f"finetune.lora: the tower {modality} has no linear layers in blocks to adapt")
        return found
    for target in config.targets:
        if not any(_names(target, name) for name in linear):
            known = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
            raise ConfigError(
                f"finetune.lora.targets: {target!r} matches no linear layer of the tower {modality}; its layers stand "
                f"under {', '.join(known)}"
            )
    return [name for name in linear if any(_names(target, name) for target in config.targets)]


def _names(target: str, layer: str) -> bool:
    """Whether `target` is the layer's name or a run of whole components of it."""
    return f".{target}." in f".{layer}."
