"""What a rank owns of parameters and optimizer state under each ZeRO stage, as flat fragments of named tensors.

Enter: a DeepSpeed engine. Leave: views into its fp32 master weights and moments with their place in the parameter;
writing to the views and calling `refresh` loads a checkpoint. This file alone knows DeepSpeed 0.19.8's internals.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mmpretrain.core.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("master", *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + len(view)) of the flattened tensor `name`, of kind `key`."""

    name: str
    key: str
    """"master", "exp_avg", "exp_avg_sq" or "average" of a trained parameter; "replica" of a frozen one or a buffer."""
    offset: int
    view: Tensor
    owned: bool
    """Whether this rank writes it; replicated fragments are read by all and written by one."""


class EngineLike(Protocol):
    """The parts of a DeepSpeed engine used here."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    global_rank: int
    world_size: int


def fragments(engine: EngineLike, stage: int) -> Iterator[Fragment]:
    """All fragments this rank holds; the optimizer's state is created where it does not exist yet."""
    ensure_optimizer_state(engine, stage)
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    per_stage = {0: _replicated, 1: _flat_partitions, 2: _flat_partitions, 3: _parameter_partitions}[stage]
    yield from per_stage(engine, trained)
    yield from _untrained(engine, stage)


def ensure_optimizer_state(engine: EngineLike, stage: int) -> None:
    """Give every optimizer parameter the zero state that its first step would; Muon has no second moment."""
    inner = inner_optimizer(engine, stage)
    for parameter, group in flat_groups(engine, stage):
        state = inner.state[parameter]
        if "step" not in state:
            device = parameter.device if inner.defaults["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for key in MOMENTS[:1] if group["orthogonal"] else MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(parameter.data)


def inner_optimizer(engine: EngineLike, stage: int) -> torch.optim.Optimizer:
    """The torch optimizer that holds moments and steps; ZeRO wraps it from stage 1 on."""
    if stage == 0:
        return engine.optimizer
    inner: torch.optim.Optimizer = engine.optimizer.optimizer  # type: ignore[attr-defined]
    return inner


def get_optimizer_step(engine: EngineLike, stage: int) -> int:
    """Number of updates AdamW has applied (skipped steps are not counted)."""
    ensure_optimizer_state(engine, stage)
    state = inner_optimizer(engine, stage).state
    return int(state[flat_groups(engine, stage)[0][0]]["step"].item())


def set_optimizer_step(engine: EngineLike, stage: int, step: int) -> None:
    """Set that number, which AdamW's bias correction uses."""
    state = inner_optimizer(engine, stage).state
    for parameter, _ in flat_groups(engine, stage):
        state[parameter]["step"].fill_(float(step))


def flat_groups(engine: EngineLike, stage: int) -> list[tuple[Tensor, Mapping[str, object]]]:
    """What the inner optimizer updates, parameters at stage 0, else flat partitions, each with its group. ZeRO-3
    empties the groups of the inner optimizer between steps, so the flats are asked for themselves."""
    groups, optimizer = inner_optimizer(engine, stage).param_groups, engine.optimizer
    if stage < 3:
        return [(parameter, group) for group in groups for parameter in group["params"]]
    return [
        (flat, groups[optimizer.sub_group_to_group_id[number]])  # type: ignore[attr-defined]
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat)  # type: ignore[attr-defined]
    ]


def refresh(engine: EngineLike, stage: int) -> None:
    """Bring the working copies in line with the master weights that were just written. Communicates at 1 to 3."""
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()  # type: ignore[attr-defined]
    elif stage == 3:
        for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):  # type: ignore[attr-defined]
            optimizer.fp16_partitioned_groups_flat[index].data.copy_(master.data)  # type: ignore[attr-defined]
            optimizer._unflatten_partitioned_parameters(index)  # type: ignore[attr-defined]
        _gather_again(optimizer.persistent_parameters)  # type: ignore[attr-defined]


@torch.no_grad()
def move_average(stage: int, average: nn.Module, network: nn.Module, keep: float) -> None:
    """average = keep * average + (1 - keep) * network, each rank for what it holds; buffers are copied.

    At stage 3 the average must be frozen, so that its partitions lie as the network's. Communicates at stage 3.
    """
    own, others = dict(average.named_parameters()), dict(network.named_parameters())
    if own.keys() != others.keys():
        first = sorted(own.keys() ^ others.keys())[0]
        raise ConfigError(
            f"a moving average follows a network with the same parameters, and only one of them has {first}; remove "
            "the objective whose teacher follows it, or leave the tower as it was built"
        )
    for name, parameter in own.items():
        mine, theirs = (_held(one, stage) for one in (parameter, others[name]))
        mine.mul_(keep).add_(theirs, alpha=1 - keep)
    for (_, mine), (_, theirs) in zip(average.named_buffers(), network.named_buffers(), strict=True):
        mine.copy_(theirs)
    if stage == 3:
        _gather_again([p for p in own.values() if p.ds_persist])  # type: ignore[attr-defined]


def _held(parameter: nn.Parameter, stage: int) -> Tensor:
    """What this rank holds of a parameter."""
    held: Tensor = parameter.ds_tensor.data if stage == 3 else parameter.data  # type: ignore[attr-defined]
    return held


def _gather_again(persistent: list[nn.Parameter]) -> None:
    """Fill small parameters, of which every rank keeps a whole copy at stage 3, from their partitions. Communicates."""
    if persistent:
        persistent[0].partition(persistent)  # type: ignore[attr-defined]
        persistent[0].all_gather(persistent)  # type: ignore[attr-defined]


Named = list[tuple[str, nn.Parameter]]


def _moments(state: Mapping[str, object]) -> list[str]:
    """The moments that an optimizer keeps."""
    return [key for key in MOMENTS if key in state]


def _replicated(engine: EngineLike, trained: Named) -> Iterator[Fragment]:
    for index, (name, parameter) in enumerate(trained):
        owned = index % engine.world_size == engine.global_rank
        yield Fragment(name, "master", 0, parameter.data.view(-1), owned)
        state = engine.optimizer.state[parameter]
        for key in _moments(state):
            yield Fragment(name, key, 0, state[key].view(-1), owned)


def _flat_partitions(engine: EngineLike, trained: Named) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    flats = optimizer.single_partition_of_fp32_groups  # type: ignore[attr-defined]
    state = inner_optimizer(engine, 1).state
    for name, parameter in trained:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        offset, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
        flat = flats[mapping.param_group_index]
        yield Fragment(name, "master", offset, mapping.hp_fragment, True)
        for key in _moments(state[flat]):
            yield Fragment(name, key, offset, state[flat][key].narrow(0, place.start, place.numel), True)


def _parameter_partitions(engine: EngineLike, trained: Named) -> Iterator[Fragment]:
    optimizer, state = engine.optimizer, inner_optimizer(engine, 3).state
    for name, parameter in trained:
        master, number = optimizer._get_fp32_opt_state_partition(parameter, True)  # type: ignore[attr-defined]
        yield from _clipped(engine, name, "master", master, parameter.ds_numel)  # type: ignore[attr-defined]
        for key in _moments(state[optimizer.fp32_partitioned_groups_flat[number]]):  # type: ignore[attr-defined]
            partition = optimizer._get_fp32_opt_state_partition(parameter, True, key)[0]  # type: ignore[attr-defined]
            yield from _clipped(engine, name, key, partition, parameter.ds_numel)  # type: ignore[attr-defined]


def _untrained(engine: EngineLike, stage: int) -> Iterator[Fragment]:
    frozen = [(n, p) for n, p in engine.module.named_parameters() if not p.requires_grad]
    if stage == 3:
        for name, parameter in frozen:
            yield from _clipped(engine, name, "replica", parameter.ds_tensor, parameter.ds_numel)  # type: ignore[attr-defined]
        frozen = []
    for index, (name, tensor) in enumerate([*frozen, *engine.module.named_buffers()]):
        yield Fragment(name, "replica", 0, tensor.data.view(-1), index % engine.world_size == engine.global_rank)


def _clipped(engine: EngineLike, name: str, key: str, partition: Tensor, numel: int) -> Iterator[Fragment]:
    """ZeRO-3 pads a parameter's last partition; only the part inside the parameter exists."""
    offset = partition.numel() * engine.global_rank
    length = min(partition.numel(), numel - offset)
    if length > 0:
        yield Fragment(name, key, offset, partition.view(-1).narrow(0, 0, length), True)
