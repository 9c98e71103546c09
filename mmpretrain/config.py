"""The whole run as one frozen tree: what to train, on what, how, and where results go.

Enter: a run file and overrides. Leave: `RunConfig`. Refuses what a single part cannot see to be wrong: batch sizes that
do not divide, objectives whose towers or fusion are missing, settings that would be ignored.
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from data_pipeline.config import DataConfig
from mmpretrain.config_checkpoint import CheckpointConfig
from mmpretrain.config_engine import AverageConfig, EngineConfig, OptimizerConfig
from mmpretrain.core.config import Config, Rule, load_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.registry import kind_of, union_of
from mmpretrain.core.types import FieldSpec
from mmpretrain.evaluation.base import TaskConfig
from mmpretrain.modalities.base import CodecConfig
from mmpretrain.modalities.image import ImageCodecConfig
from mmpretrain.modalities.text import TextCodecConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.finetune import FinetuneConfig, unknown_towers
from mmpretrain.objectives.base import ObjectiveConfig, expand_all
from mmpretrain.tracking.base import TrackerConfig

if TYPE_CHECKING:
    CodecUnion = CodecConfig
    ObjectiveUnion = ObjectiveConfig
    TaskUnion = TaskConfig
    TrackerUnion = TrackerConfig
else:
    CodecUnion = union_of("mmpretrain.modalities", CodecConfig)
    ObjectiveUnion = union_of("mmpretrain.objectives", ObjectiveConfig)
    TaskUnion = union_of("mmpretrain.evaluation", TaskConfig)
    TrackerUnion = union_of("mmpretrain.tracking", TrackerConfig)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = ("max_rank",)
"""Objective names that would shadow a metric: train/loss_max_rank is the largest loss of a rank."""


class ScheduleConfig(Config):
    """Linear warmup to the peak rate, then cosine, linear or no decay until the last step."""

    kind: Literal["cosine", "constant", "linear"] = "cosine"
    warmup: NonNegativeInt = 100
    """Length of the warmup in `unit`s."""
    unit: Literal["steps", "samples"] = "steps"
    """What `warmup` counts."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """What the rate falls to, as a share of the peak; the step after the last would have it."""

    def broken_rules(self) -> Iterator[Rule]:
        if self.kind == "constant" and self.final_fraction:
            yield ("final_fraction",), "a constant schedule does not decay; remove it or use kind cosine or linear"


class RunDataConfig(DataConfig):
    """The data part with the codecs that turn members into tensors."""

    codecs: dict[str, CodecUnion] = {"image": ImageCodecConfig(), "text": TextCodecConfig()}
    """Batch field -> how its members are decoded and augmented; one per tower, and one per label of an objective."""


class EvaluationConfig(Config):
    """What is measured while training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: only after the last step."""
    tasks: dict[str, TaskUnion] = {}
    """Name -> task."""

    def broken_rules(self) -> Iterator[Rule]:
        if self.every and not self.tasks:
            yield ("every",), f"saw {self.every}, but there are no evaluation.tasks to run; add one or set it to 0"


class TrackingConfig(Config):
    """Where metrics go besides the console and metrics.jsonl, which are always written."""

    log_every: PositiveInt = 10
    """Steps between lines on the console and rows in the trackers; metrics.jsonl has every step."""
    trackers: list[TrackerUnion] = []
    """Further sinks."""

    def broken_rules(self) -> Iterator[Rule]:
        kinds = [kind_of(type(tracker)) for tracker in self.trackers]
        for index, kind in enumerate(kinds):
            if kind in kinds[:index]:
                yield ("trackers", index), f"a second tracker of kind {kind}; keep one"


class SpikeConfig(Config):
    """What counts as a spike of loss or gradient norm, and what follows."""

    sigmas: float = Field(6.0, gt=0)
    """Standard deviations above the mean of the window."""
    window: int = Field(128, ge=32)
    """Steps before, with which a step is compared."""
    action: Literal["alert", "roll_back"] = "alert"
    """roll_back: go on from the newest checkpoint, with the data after the spike."""
    max_rollbacks: PositiveInt = 3
    """A spike after so many returns ends the run."""


class RunConfig(Config):
    """One training run."""

    output: Path
    """The run folder; a run that finds its own checkpoints there continues."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    seed: NonNegativeInt = 0
    """Decides initial weights, order of samples, augmentation and masking."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16: fp32 parameters, bf16 autocast in forward; fp16: needs CUDA, with dynamic loss scaling."""
    zero_stage: int = Field(2, ge=0, le=3)
    """What ranks partition: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt
    """Samples of one rank in one forward; accumulation follows."""
    trace_samples: bool = False
    """Write the sample keys of every step to samples.jsonl."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps in a row that may be skipped because a loss or gradient is not finite; one more stops the run."""
    spikes: SpikeConfig = SpikeConfig()
    deterministic: bool = False
    """Use deterministic kernels alone, and fail where there is none."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    model: ModelConfig
    """Towers, fusion, embedding."""
    finetune: FinetuneConfig | None = None
    """What to start from and what learns, for `mmpretrain finetune`; null: everything learns, from its own start."""
    objectives: dict[str, ObjectiveUnion]
    """Name -> objective; each reports train/loss_<name>, one of several pairs train/loss_<name>_<first>_<second>."""
    data: RunDataConfig
    """Shards, tokenizer, codecs, loader."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: AverageConfig | None = None
    """Keep a moving average of the weights, e.g. {decay: 0.9999}; null: none."""
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    def broken_rules(self) -> Iterator[Rule]:
        yield from _batch_rules(self)
        yield from _schedule_rules(self)
        yield from _phase_rules(self)
        yield from _objective_rules(self)
        yield from _codec_rules(self)
        yield from _task_rules(self)
        yield from _best_rules(self)
        if self.finetune is not None:
            yield from unknown_towers(self.finetune, self.model.towers)
        if self.precision == "fp16" and self.zero_stage == 0:
            yield (
                ("precision",),
                "fp16 scales its loss in a partitioned optimizer; set zero_stage to 1 or more, or precision to bf16",
            )
        if self.engine.float8 and self.precision != "bf16":
            yield ("engine", "float8"), f"gives bf16 and the precision is {self.precision}; set precision to bf16"
        if self.engine.compile and self.zero_stage == 3:
            yield (
                ("engine", "compile"),
                "stage 3 gathers weights inside each block, which breaks compiled graphs apart and makes them slower; "
                "set zero_stage to 2 or less, or compile to false",
            )
        if self.engine.offload != "none" and self.optimizer.kind == "muon":
            yield (
                ("engine", "offload"),
                "muon gathers momentum between GPUs, which it cannot in CPU memory; set offload to none, or "
                "optimizer.kind to adamw",
            )
        if self.engine.offload != "none" and self.zero_stage == 0:
            yield (
                ("engine", "offload"),
                "moves a partitioned optimizer; set zero_stage to 1 or more or offload to none",
            )


def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`, or 1 where it is not among the largest million."""
    least = -(-number // most)
    return next((number // by for by in range(least, least + 1_000_000) if number % by == 0), 1)


def _batch_rules(run: RunConfig) -> Iterator[Rule]:
    size, micro = run.global_batch_size, run.micro_batch_size
    if size % micro:
        fit = _largest_divisor(size, micro)
        yield (
            ("micro_batch_size",),
            f"global_batch_size {size} is not a multiple of micro_batch_size {micro}; use e.g. micro_batch_size={fit}",
        )


def _schedule_rules(run: RunConfig) -> Iterator[Rule]:
    schedule = run.schedule
    steps = schedule.warmup if schedule.unit == "steps" else math.ceil(schedule.warmup / run.global_batch_size)
    if steps > run.steps:
        yield (
            ("schedule", "warmup"),
            f"the warmup of {steps} steps is longer than the run of {run.steps}; lower schedule.warmup or raise steps",
        )


def _phase_rules(run: RunConfig) -> Iterator[Rule]:
    for modality, tower in run.model.towers.items():
        if tower.last_phase >= run.steps:
            yield (
                ("model", "towers", modality),
                f"its last phase begins at from_step {tower.last_phase}, which a run of {run.steps} steps does not "
                f"reach; begin it sooner or raise steps",
            )


def _changing_grids(run: RunConfig, path: tuple[str, ...], modalities: Sequence[str]) -> Iterator[Rule]:
    for modality in modalities:
        tower = run.model.towers.get(modality)
        if tower is not None and tower.changes_grid:
            yield (
                path,
                f"hides patches of one grid, and that of model.towers.{modality} changes over the steps; remove the "
                f"stem's phases or the objective",
            )


def _objective_rules(run: RunConfig) -> Iterator[Rule]:
    if not run.objectives:
        yield ("objectives",), "there is nothing to learn; add one, e.g. itc: {kind: infonce}"
    for name, objective in run.objectives.items():
        path = ("objectives", name)
        if not _NAME.fullmatch(name) or name in _RESERVED:
            yield path, "the name becomes a metric; use lower-case letters, digits and _, and none of max_rank"
        yield from _missing_towers(run, path, objective.modalities)
        yield from _changing_grids(run, path, objective.fixed_grids)
        if lack := run.model.lacking_fusion(objective):
            yield path, lack
    try:
        expand_all(run.objectives, run.model.towers)
    except ConfigError as fault:
        yield ("objectives",), str(fault)
    used = any(objective.needs_fusion or objective.needs_pooled for objective in run.objectives.values())
    if run.model.fusion.gives_pooled and run.objectives and not used:
        yield (
            ("model", "fusion"),
            "no objective reads what is fused, so it would never learn; set model.fusion.kind to late or "
            "give an objective a use for it, e.g. condition_on of mlm",
        )


def _codec_rules(run: RunConfig) -> Iterator[Rule]:
    readers, codecs = run.model.readers, run.data.codecs
    labels: dict[str, FieldSpec] = {}
    for objective_name, objective in run.objectives.items():
        for name, spec in objective.input_fields.items():
            path = ("objectives", objective_name)
            if name in readers:
                yield path, f"reads {name} as a label, but that is a tower's input; name the label otherwise"
            if labels.setdefault(name, spec) != spec:
                yield path, f"reads {name} in another form than an objective before it; give it a label of its own"
    for name in readers.keys() - codecs.keys():
        what = f"the tower {name}" if readers[name] == name else f"{name}, which shares the tower {readers[name]}"
        yield ("data", "codecs"), f"has no codec for {what}; add {name}: {_codec_of(name, readers[name])}"
    for name in labels.keys() - codecs.keys() - readers.keys():
        yield ("data", "codecs"), f"has no codec for the label {name}; add {name}: {{kind: label, field: {name}}}"
    for name in codecs.keys() - readers.keys() - labels.keys():
        yield (
            ("data", "codecs", name),
            f"the model has no tower {name} and no objective reads it; remove the codec or add model.towers.{name}",
        )
    for name, codec in codecs.items():
        kind = kind_of(type(codec))
        if name in labels and name not in readers and (kind != "label" or codec.makes != name):
            yield ("data", "codecs", name), f"is to make the label {name}; write {name}: {{kind: label, field: {name}}}"
        elif name in readers and kind != readers[name]:
            yield ("data", "codecs", name), f"decodes {kind}; set its kind to {readers[name]}"
        elif name in readers and codec.makes != name:
            yield ("data", "codecs", name), f"fills the field {codec.makes}; only texts and labels can be given another"


def _codec_of(name: str, kind: str) -> str:
    return f"{{kind: {kind}}}" if name == kind else f"{{kind: {kind}, field: {name}, key: {name}}}"


def _task_rules(run: RunConfig) -> Iterator[Rule]:
    seen: dict[tuple[object, ...], str] = {}
    for name, task in run.evaluation.tasks.items():
        path = ("evaluation", "tasks", name)
        yield from _missing_towers(run, path, task.modalities)
        for fault in task.faults(run.model.towers, run.objectives):
            yield path, fault
        for group in sorted(task.figure_groups(run.model.towers)):
            first = seen.setdefault((type(task), group, task.prefix), name)
            if first != name:
                yield path, f"its figures have the names of those of {first}; give it another prefix"


def _best_rules(run: RunConfig) -> Iterator[Rule]:
    best, every = run.checkpoint.keep_best, run.evaluation.every
    if best is None or best.metric.startswith("train/"):
        return
    if not every or every % run.checkpoint.every:
        yield (
            ("checkpoint", "keep_best"),
            f"of evaluation.every {every} and checkpoint.every {run.checkpoint.every} follows that what is measured is "
            f"not what is saved; set evaluation.every to a multiple of checkpoint.every",
        )


def _missing_towers(run: RunConfig, path: tuple[str, ...], modalities: Sequence[str]) -> Iterator[Rule]:
    for modality in modalities:
        if modality not in run.model.readers:
            known = ", ".join(run.model.readers)
            yield path, f"needs the tower {modality}, the model has {known}; add model.towers.{modality} or remove it"


def configs_folder() -> Path:
    """Where the complete runs and fragments that come with the project lie: the checkout, or the installed copy."""
    checkout = Path(__file__).resolve().parents[1] / "configs"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "mmpretrain" / "configs"


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file upon its defaults, with `key=value` overrides; raises ConfigError with every fault."""
    return load_config(RunConfig, path, overrides, (configs_folder(),))
