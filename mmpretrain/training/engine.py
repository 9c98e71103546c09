"""The only place that runs DeepSpeed: one global batch in, one optimizer step out, whatever the stage and the ranks.

Enter: a freshly built model and the run's config. Leave: `StepResult` of one step. Refuses fp16 without CUDA, and
DeepSpeed options that contradict the run's own or that DeepSpeed does not know or accept.
"""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import all_reduce_sum, world_size
from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.core.types import Batch, TensorDict
from mmpretrain.modalities.images_on_gpu import decode_left
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.trained_parts import learning_rate_shares
from mmpretrain.training.averaged import WeightAverage
from mmpretrain.training.compiling import compile_blocks
from mmpretrain.training.float8 import use_float8
from mmpretrain.training.fragments import Fragment, fragments, inner_optimizer, move_average
from mmpretrain.training.loss_scale import LossScale
from mmpretrain.training.muon import MuonAdamW
from mmpretrain.training.optimizer import build_optimizer
from mmpretrain.training.partitions import matrix_places
from mmpretrain.training.parts import AUTOCAST
from mmpretrain.training.stopwatch import Stopwatch

_REPLACED = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
}
"""DeepSpeed's options for which the run config has a key of its own."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; sums and counts are over the global batch."""

    losses: Mapping[str, Tensor]
    """Objective -> sum of this rank, fp32 []; divide by `counts` after summing over ranks."""
    counts: Mapping[str, Tensor]
    """Objective -> targets in the global batch, fp32 []."""
    weights: Mapping[str, float]
    """Objective -> what it weighed in the total loss of this step."""
    scheduled: tuple[str, ...]
    """Objectives whose weight changes over the steps."""
    metrics: Mapping[str, Tensor]
    grad_norm: float
    """Global L2 norm before clipping; not finite when the step was skipped."""
    skipped: bool
    loss_scale: float | None
    """By which fp16 gradients were scaled; None in other precisions."""
    compute_s: float
    """Seconds this rank encoded its rows before it met the others."""


class Engine:
    """A DeepSpeed engine around the model; `step` holds the accumulation and scaling rules of the design."""

    def __init__(self, model: MultimodalTransformer, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.config = config
        self.model = model
        model.autocast_dtype = AUTOCAST[config.precision]
        model.set_activation_checkpointing(config.engine.activation_checkpointing)
        if config.engine.float8:
            use_float8(model, device)
        if config.engine.compile:
            compile_blocks(model, config.engine.compile_cache, device)
        accumulation = config.global_batch_size // (config.micro_batch_size * world_size())
        self.backwards_per_step = 1 if model.spans_batch else accumulation
        self.deepspeed = _initialize(model, config, self.backwards_per_step)
        optimizer = inner_optimizer(self.deepspeed, self.stage)
        if isinstance(optimizer, MuonAdamW):
            optimizer.places = matrix_places(self.deepspeed, self.stage)
        self.average = None if config.ema is None else WeightAverage(config.ema, self._fragments())
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self._update_waits_for: Callable[[], None] | None = None
        self._stopwatch = Stopwatch(device)
        model.when_encoded = self._stopwatch.stop

    @property
    def stage(self) -> int:
        return self.config.zero_stage

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run, skipped ones and those before a checkpoint counted."""
        return int(self.deepspeed.global_steps)

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train on this rank's micro-batches of one global batch. Communicates."""
        if self.steps_done == 0:
            self._let_go()
            self._after_step()
        self.model.begin_step(self.steps_done)
        trim = self.model.trimmed if self.config.engine.trim_text else dict
        micro = [self.to_device(trim(decode_left(batch.tensors, batch.keys, self.device))) for batch in batches]
        counts = self._global_counts(micro)
        scales = {name: world_size() / count.clamp(min=1.0) for name, count in counts.items()}
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        loss_scale = self.loss_scale
        if loss_scale is not None:
            self.deepspeed.optimizer.override_loss_scale(loss_scale.value)
        skipped_before = self.deepspeed.skipped_steps
        outputs = [self._forward_backward(part, scales) for part in self._parts(micro)]
        skipped = self.deepspeed.skipped_steps > skipped_before
        if loss_scale is not None:
            self.loss_scale = loss_scale.after(skipped)
        if not skipped:
            self._after_step()
            if self.average is not None:
                self.average.follow(self.steps_done)
        return StepResult(
            losses={name: _total(outputs, f"sum.{name}") for name in counts},
            counts=counts,
            weights=self.model.weights,
            scheduled=self.model.scheduled,
            metrics=_means(outputs, "metric."),
            grad_norm=float(self.deepspeed.get_global_grad_norm() or 0.0),
            skipped=skipped,
            loss_scale=None if loss_scale is None else loss_scale.value,
            compute_s=self._stopwatch.read(),
        )

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of weights, moments and their average: all that a checkpoint saves and restores."""
        yield from self._fragments()
        if self.average is not None:
            yield from self.average.fragments

    def _fragments(self) -> Iterator[Fragment]:
        return fragments(self.deepspeed, self.stage)

    def hold_update(self, until: Callable[[], None]) -> None:
        """Call `until` before weights, moments or averages change next; buffers may change before."""
        self._update_waits_for = until

    def _let_go(self) -> None:
        until, self._update_waits_for = self._update_waits_for, None
        if until is not None:
            until()

    def to_device(self, tensors: TensorDict) -> TensorDict:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def _after_step(self) -> None:
        self.model.after_step(self.steps_done, partial(move_average, self.stage))

    def _parts(self, micro: list[TensorDict]) -> list[list[TensorDict]]:
        """What goes through one engine forward: the whole share of the rank when a loss spans the batch."""
        return [micro] if self.backwards_per_step == 1 else [[one] for one in micro]

    def _forward_backward(self, part: list[TensorDict], scales: TensorDict) -> TensorDict:
        self._stopwatch.start()
        output: TensorDict = self.deepspeed(part, scales)
        loss = output["loss"]
        # A loss that is not finite must reach every rank's gradient, even where its own derivative is finite.
        loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if self.deepspeed.is_gradient_accumulation_boundary():
            self._let_go()
        self.deepspeed.step()
        return {name: value.detach() for name, value in output.items()}

    def _global_counts(self, micro: list[TensorDict]) -> dict[str, Tensor]:
        with torch.no_grad():
            counts = self.model.counts(micro)
        names = sorted(counts)
        packed = all_reduce_sum(torch.stack([counts[name] for name in names]))
        return dict(zip(names, packed.unbind(), strict=True))


def _total(outputs: Sequence[TensorDict], name: str) -> Tensor:
    return torch.stack([output[name] for output in outputs]).sum()


def _means(outputs: Sequence[TensorDict], prefix: str) -> dict[str, Tensor]:
    names = [name for name in outputs[0] if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): torch.stack([output[name].float() for output in outputs]).mean() for name in names
    }


def check_precision(config: RunConfig, device: torch.device) -> None:
    """Refuse fp16 where the device cannot hold it."""
    if config.precision == "fp16" and device.type != "cuda":
        raise ClusterError(
            f"precision: fp16 needs a CUDA device and this run is on {device.type}; use precision: bf16 or fp32"
        )


def deepspeed_config(config: RunConfig, backwards_per_step: int, world: int) -> dict[str, object]:
    """DeepSpeed's own dictionary, generated; `engine.deepspeed` adds what is not modelled here."""
    stage = config.zero_stage
    zero: dict[str, object] = {"stage": stage}
    if stage >= 1 and config.engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["memory_efficient_linear"] = False
    generated: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": backwards_per_step,
        "train_batch_size": backwards_per_step * world,
        "gradient_clipping": config.optimizer.clip_grad_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    for key in _REPLACED.keys() & config.engine.deepspeed.keys():
        raise ConfigError(f"engine.deepspeed.{key}: the run's own {_REPLACED[key]} decides this; set that instead")
    merged = _merged(generated, config.engine.deepspeed, "engine.deepspeed")
    if config.engine.deepspeed:
        _check_options(merged)
    return merged


class _Watched(dict[str, object]):
    """Options that remember which of them were asked for."""

    def __init__(self, options: Mapping[str, object]) -> None:
        super().__init__(options)
        self.asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> object:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self.asked.add(key)
        return super().get(key, default)


def _check_options(options: Mapping[str, object]) -> None:
    """DeepSpeed passes over a top-level option that it does not know: one that it never asks for while it reads."""
    watched = _Watched(options)
    try:
        deepspeed.DeepSpeedConfig(watched)
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, AssertionError) as fault:
        reason = "; ".join(line.strip() for line in str(fault).splitlines() if "errors.pydantic.dev" not in line)
        raise ConfigError(f"engine.deepspeed: DeepSpeed refuses these options ({reason})") from fault
    for key in watched.keys() - watched.asked:
        near = difflib.get_close_matches(key, [known for known in watched.asked if isinstance(known, str)], n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        raise ConfigError(f"engine.deepspeed.{key}: DeepSpeed knows no such option and would pass over it; {hint}")


def _merged(ours: dict[str, object], extra: Mapping[str, object], path: str) -> dict[str, object]:
    merged = dict(ours)
    for key, value in extra.items():
        here = merged.get(key)
        if isinstance(here, dict) and isinstance(value, Mapping):
            merged[key] = _merged(here, value, f"{path}.{key}")
        elif key in merged and here != value:
            raise ConfigError(
                f"{path}.{key}: {value!r} contradicts {here!r}, which the run's own settings give; remove it and use "
                f"the run's key instead"
            )
        else:
            merged[key] = value
    return merged


def _initialize(model: MultimodalTransformer, config: RunConfig, backwards_per_step: int) -> deepspeed.DeepSpeedEngine:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer PyTorch calls old; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPU this op is compiled at start-up, which takes half a minute and a compiler; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    shares = None if config.finetune is None else learning_rate_shares(model, config.finetune)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optimizer, config.zero_stage, shares),
        config=deepspeed_config(config, backwards_per_step, world_size()),
    )
    if config.zero_stage == 0 and world_size() == 1:
        engine.enable_backward_allreduce = False  # it would flatten and copy every gradient for nobody
    return engine
