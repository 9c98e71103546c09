"""How much memory a rank needs, by part, at each ZeRO stage, and which micro-batch fits.

Enter: a workload, a stage and the number of ranks. Leave: bytes by part. What the engine holds follows DeepSpeed 0.19.8
(stages of arXiv 1910.02054): fp32 weights at every stage, from stage 1 on fp32 masters beside them, a reduction buffer
of fixed size while gradients come in; at stage 3 weights that are used again soon stay gathered. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from pydantic import JsonValue

from mmpretrain.config import RunConfig
from mmpretrain.layers.recompute import Recompute
from mmpretrain.planning.recorder import Moment
from mmpretrain.planning.workload import Parameters, Workload

GIB = 2.0**30
WORD = 4
"""Bytes of a weight, a gradient, a master weight and each moment."""
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a run beside the model; a plan varies it."""

    stage: int
    ranks: int
    micro: int
    recompute: Recompute
    offloaded: bool
    averaged: bool
    """A moving average of the weights is kept."""
    reduce_bucket: int
    """Gradients, in numbers, that are reduced at once."""
    overlap: bool
    """Gradients are reduced while the backward goes on."""
    contiguous: bool
    """They are copied into a buffer of that size."""
    reuse_distance: int
    """Stage 3: weights used again within so many stay gathered."""
    prefetch: int
    """Stage 3: weights gathered ahead."""


def setting_of(config: RunConfig, ranks: int, stage: int | None = None) -> Setting:
    """The run's own setting, or that of another stage; options that the run leaves out have DeepSpeed's defaults."""
    stage = config.zero_stage if stage is None else stage
    zero = config.engine.deepspeed.get("zero_optimization", {})
    options = zero if isinstance(zero, dict) else {}
    return Setting(
        stage=stage,
        ranks=ranks,
        micro=config.micro_batch_size,
        recompute=config.engine.activation_checkpointing,
        offloaded=config.engine.offload == "optimizer" and stage > 0,
        averaged=config.ema is not None,
        reduce_bucket=_number(options, "reduce_bucket_size", 500_000_000),
        overlap=bool(options.get("overlap_comm", stage == 3)) and stage > 0,
        contiguous=bool(options.get("contiguous_gradients", True)),
        reuse_distance=_number(options, "stage3_max_reuse_distance", 1_000_000_000),
        prefetch=_number(options, "stage3_prefetch_bucket_size", 50_000_000),
    )


def _number(options: Mapping[str, JsonValue], name: str, default: int) -> int:
    found = options.get(name, default)
    return int(found) if isinstance(found, int | float) else default


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step; what stands side by side adds up."""

    weights: float
    gradients: float
    optimizer: float
    """Master weights, moments and averages."""
    buffers: float
    """In which gradients are gathered for their reduction."""
    live_weights: float
    """ZeRO-3: weights of all ranks that are gathered at once."""
    inputs: float
    activations: float
    features: float
    """Gathered features and tiles of the loss, beyond the peak of the activations."""

    @property
    def total(self) -> float:
        return sum(self.by_part.values())

    @property
    def by_part(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def state_memory(parameters: Parameters, setting: Setting, waiting: bool = False) -> Memory:
    """What is held whatever the batch; `waiting`: whole gradients wait for those of further micro-batches."""
    total, trained = WORD * parameters.total, WORD * parameters.trained
    stage, ranks = setting.stage, setting.ranks
    share = trained / ranks if stage else trained
    buffer = WORD * setting.reduce_bucket * (2 if setting.overlap and stage < 3 else 1)
    return Memory(
        weights=total / ranks if stage == 3 else total,
        gradients=share + trained if waiting and stage == 3 else trained if waiting else share,
        optimizer=0.0 if setting.offloaded else ((3 if stage else 2) + setting.averaged) * share,
        buffers=buffer if stage and setting.contiguous else 0.0,
        live_weights=min(total, WORD * (setting.reuse_distance / 2 + setting.prefetch)) if stage == 3 else 0.0,
        inputs=0.0,
        activations=0.0,
        features=0.0,
    )


def chunks_of(workload: Workload, setting: Setting) -> int:
    """Micro-batches of a step."""
    return workload.rows * workload.chunks // setting.micro


def step_memory(workload: Workload, setting: Setting) -> Memory:
    """The whole of a step with micro-batches of `setting.micro` rows."""
    scale = setting.micro / workload.rows
    chunks = chunks_of(workload, setting)
    encoding = workload.encodings[setting.recompute]
    states = state_memory(workload.parameters, setting, chunks > 1 and (workload.spans_batch or setting.stage == 1))
    activations = _activations(encoding.moments, scale, states, setting, first=chunks == 1)
    parts = encoding.parts.times(scale).total * (chunks if workload.spans_batch else 1)
    met = encoding.kept.times(scale).total + _most(workload.joining.moments, 1.0 if workload.spans_batch else scale)
    met -= _not_yet_there(states, setting, first=workload.spans_batch or chunks == 1)
    return Memory(
        **states.by_part
        | {
            "inputs": encoding.inputs.times(scale).total * chunks,
            "activations": activations,
            "features": parts + max(0.0, met - activations),
        }
    )


def _most(moments: Sequence[Moment], scale: float) -> float:
    return max(moment.live.times(scale).total for moment in moments)


def _activations(moments: Sequence[Moment], scale: float, states: Memory, setting: Setting, first: bool) -> float:
    """What a backward needs beyond the gradients that `states` counts; `first`: it finds none of them there."""
    if not first or setting.stage == 3:
        return _most(moments, scale)
    at_once = [moment.live.times(scale).total + _gradients_by(moment, states, setting) for moment in moments]
    return max(0.0, max(at_once) - states.gradients)


def _gradients_by(moment: Moment, states: Memory, setting: Setting) -> float:
    """Whole gradients one after the other, or a rank's share of them from the first reduction on."""
    if setting.stage == 0:
        return moment.gradients
    return states.gradients if moment.gradients >= WORD * setting.reduce_bucket else 0.0


def _not_yet_there(states: Memory, setting: Setting, first: bool) -> float:
    """Of the states, what the backward makes room for only after the loss is known."""
    if setting.stage == 3:
        return 0.0
    return states.buffers + (states.gradients if first else 0.0)


def micro_batches(workload: Workload) -> Iterator[int]:
    """Those that divide a rank's rows, largest first."""
    rows = workload.rows * workload.chunks
    return (size for size in range(rows, 0, -1) if rows % size == 0)


def largest_micro_batch(workload: Workload, setting: Setting, capacity: float) -> int | None:
    """The largest that fits into so many bytes; None where not even one row does."""
    for size in micro_batches(workload):
        if step_memory(workload, replace(setting, micro=size)).total <= capacity:
            return size
    return None


def checkpoint_bytes(parameters: Parameters, setting: Setting) -> int:
    """Masters, two moments and perhaps averages of what learns, the rest once."""
    return WORD * ((3 + setting.averaged) * parameters.trained + parameters.total - parameters.trained)
