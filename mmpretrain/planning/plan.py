"""The plan of a run: all that can be said of it before it is started.

Enter: a run config, a number of GPUs and their kind. Leave: a `Plan` of plain figures. Refused: a global batch that the
GPUs cannot share, with what to change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mmpretrain.config import RunConfig
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.registry import kind_of
from mmpretrain.layers.recompute import Recompute
from mmpretrain.planning.machines import Machine
from mmpretrain.planning.memory import (
    STAGES,
    Memory,
    Setting,
    checkpoint_bytes,
    chunks_of,
    largest_micro_batch,
    setting_of,
    state_memory,
    step_memory,
)
from mmpretrain.planning.stand_ins import resolve_model
from mmpretrain.planning.step_time import StepTime, model_flops, step_time
from mmpretrain.planning.workload import Parameters, Workload, count_parameters, measure
from mmpretrain.training.parts import model_on_meta

DECODED_PER_CORE = {"image": 648.0, "video": 21.0, "audio": 320.0}
"""Per core and second: photos of about 500 pixels (benchmarks/README.md); 8 frames of 6 s of 360p video, and 10 s of
sound as OGG, each read by PyAV or soundfile on one thread."""
SMALL_BUCKET = 50_000_000


@dataclass(frozen=True)
class StageFit:
    """One ZeRO stage with all else as in the config."""

    stage: int
    memory: Memory
    fits: bool
    largest_micro_batch: int | None
    """None: not even one row fits."""


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: float
    backward: float
    recomputed: float
    """More of it with activation checkpointing."""


@dataclass(frozen=True)
class Advice:
    """One change of the config, what a GPU would then hold, and how long a step would take."""

    change: str
    bytes: float
    fits: bool
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything, per GPU where nothing else is said."""

    gpus: int
    gpu: str
    capacity: float
    micro_batch: int
    micro_batches: int
    """Of a step."""
    global_batch: int
    steps: int
    zero_stage: int
    parameters: Parameters
    stages: tuple[StageFit, ...]
    flops: Flops
    time: StepTime
    mfu: float
    samples_per_s: float
    """Of all GPUs."""
    node_samples_per_s: float
    decoding_cores: float
    """Of each node."""
    gpu_hours: float
    checkpoint_bytes: int
    advice: tuple[Advice, ...]
    """How to make it fit; where it does, what is faster."""
    notes: tuple[str, ...]

    @property
    def chosen(self) -> StageFit:
        return self.stages[self.zero_stage]


def make_plan(config: RunConfig, gpus: int, machine: Machine) -> Plan:
    """Everything about a run on so many GPUs of one kind."""
    return plan_of(config, measure(config, share_batch(config, gpus)), gpus, machine)


def plan_of(config: RunConfig, workload: Workload, gpus: int, machine: Machine) -> Plan:
    """The same of a workload that was measured for so many GPUs."""
    setting = setting_of(config, gpus)
    stages = tuple(_fit(workload, setting_of(config, gpus, stage), machine) for stage in STAGES)
    time = step_time(workload, setting, machine)
    rate = config.global_batch_size / time.total
    in_node = rate * min(gpus, machine.gpus_per_node) / gpus
    return Plan(
        gpus=gpus,
        gpu=machine.name,
        capacity=machine.capacity,
        micro_batch=workload.rows,
        micro_batches=workload.chunks,
        global_batch=config.global_batch_size,
        steps=config.steps,
        zero_stage=config.zero_stage,
        parameters=workload.parameters,
        stages=stages,
        flops=_flops(workload, setting.recompute),
        time=time,
        mfu=model_flops(workload) * rate / gpus / machine.rates.peak,
        samples_per_s=rate,
        node_samples_per_s=in_node,
        decoding_cores=in_node * _decoding_s(config),
        gpu_hours=config.steps * time.total * gpus / 3600,
        checkpoint_bytes=checkpoint_bytes(workload.parameters, setting),
        advice=tuple(_advice(workload, setting, machine)),
        notes=tuple(_notes(config, workload)),
    )


def state_estimate(config: RunConfig, ranks: int) -> tuple[Parameters, Memory]:
    """Parameters, and what their states take on each rank, without a look at the batch."""
    parameters = count_parameters(model_on_meta(config, resolve_model(config).config))
    return parameters, state_memory(parameters, setting_of(config, ranks))


def share_batch(config: RunConfig, gpus: int) -> BatchPlan:
    """How the GPUs share a step; refuses what does not divide, and says what would."""
    size, micro = config.global_batch_size, config.micro_batch_size
    if size % gpus:
        fitting = [number for number in _divisors(size) if number < gpus][-1:]
        fitting += [number for number in _divisors(size) if number > gpus][:1]
        near = max(1, round(size / (gpus * micro))) * gpus * micro
        raise ConfigError(
            f"global_batch_size {size} cannot be shared by {gpus} GPUs alike; use --gpus "
            f"{' or '.join(map(str, fitting))}, or global_batch_size={near}"
        )
    rows = size // gpus
    if rows % micro:
        fit = max(number for number in _divisors(rows) if number <= micro)
        raise ConfigError(
            f"each of {gpus} GPUs holds {rows} samples of a step, which micro_batch_size {micro} does not divide; use "
            f"micro_batch_size={fit}"
        )
    return BatchPlan(size, micro, World(0, gpus))


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _fit(workload: Workload, setting: Setting, machine: Machine) -> StageFit:
    memory = step_memory(workload, setting)
    largest = largest_micro_batch(workload, setting, machine.capacity)
    return StageFit(setting.stage, memory, memory.total <= machine.capacity, largest)


def _flops(workload: Workload, recompute: Recompute) -> Flops:
    plain, checkpointed = workload.encoding, workload.encodings["block" if recompute == "none" else recompute]
    joined = workload.rows * (workload.chunks if workload.spans_batch else 1)
    return Flops(
        forward=plain.forward.flops / workload.rows + workload.joining.forward.flops / joined,
        backward=plain.backward.flops / workload.rows + workload.joining.backward.flops / joined,
        recomputed=(checkpointed.backward.flops - plain.backward.flops) / workload.rows,
    )


def _decoding_s(config: RunConfig) -> float:
    """Core-seconds of one sample that holds everything; what is decoded once and kept counts nothing."""
    kinds = [kind_of(type(codec)) for codec in config.data.codecs.values() if not codec.keep]
    return sum(1 / DECODED_PER_CORE[kind] for kind in kinds if kind in DECODED_PER_CORE)


def _advice(workload: Workload, setting: Setting, machine: Machine) -> Iterator[Advice]:
    """Where the run does not fit, each change alone and all of them; where it does, what fits as well and is faster."""
    now = step_time(workload, setting, machine).total
    fits = step_memory(workload, setting).total <= machine.capacity
    for change, changed in _changes(workload, setting, machine, fits):
        total, seconds = step_memory(workload, changed).total, step_time(workload, changed, machine).total
        if not fits or (total <= machine.capacity and seconds < 0.99 * now):
            yield Advice(change, total, total <= machine.capacity, seconds)


def _changes(workload: Workload, setting: Setting, machine: Machine, fits: bool) -> Iterator[tuple[str, Setting]]:
    """Changes of the config as one writes them, and the setting they lead to."""
    yield from _other_micro_batch(workload, setting, machine, "")
    if fits:
        if setting.recompute != "none":
            plain = replace(setting, recompute="none")
            yield "engine.activation_checkpointing=none", plain
            yield from _other_micro_batch(workload, plain, machine, "engine.activation_checkpointing=none ")
        return
    if setting.recompute != "block":
        again = replace(setting, recompute="block")
        yield "engine.activation_checkpointing=block", again
        yield from _other_micro_batch(workload, again, machine, "engine.activation_checkpointing=block ")
    for stage in range(setting.stage + 1, 4):
        yield f"zero_stage={stage}", replace(setting, stage=stage)
    if not setting.offloaded:
        also = "" if setting.stage else " zero_stage=1"
        yield f"engine.offload=optimizer{also}", replace(setting, offloaded=True, stage=max(1, setting.stage))
    small = min(setting.reduce_bucket, SMALL_BUCKET)
    if setting.stage and small < setting.reduce_bucket:
        key = "engine.deepspeed.zero_optimization.reduce_bucket_size"
        yield f"{key}={small}", replace(setting, reduce_bucket=small)
    everything = replace(setting, micro=1, recompute="block", stage=3, offloaded=True, reduce_bucket=small)
    yield "all of these, with micro_batch_size=1", everything


def _other_micro_batch(
    workload: Workload, setting: Setting, machine: Machine, before: str
) -> Iterator[tuple[str, Setting]]:
    """The largest micro-batch that fits, where it is another."""
    fit = largest_micro_batch(workload, setting, machine.capacity)
    if fit is not None and fit != setting.micro:
        changed = replace(setting, micro=fit)
        yield f"{before}micro_batch_size={fit} ({chunks_of(workload, changed)} a step)", changed


def _notes(config: RunConfig, workload: Workload) -> Iterator[str]:
    if workload.guessed_words is not None:
        yield (
            f"the vocabulary of {workload.guessed_words} is not on this machine; a size was assumed, set "
            "model.towers.text.stem.vocab_size to have it counted"
        )
    if config.precision == "fp32":
        yield "precision fp32 leaves the tensor cores unused"
    if any(codec.missing == "weightless" for codec in config.data.codecs.values()):
        yield "the loader's cores are for samples that hold every modality"
