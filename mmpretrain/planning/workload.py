"""What a rank computes in one optimizer step, found by running the run's own model on tensors without storage.

Enter: a run config, the number of ranks, rows of a micro-batch. Leave: the work and the memory of the two halves of a
step: encoding one chunk of rows, and joining the chunks into a loss over all ranks. Refused: what building the model
refuses.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpretrain.config import RunConfig
from mmpretrain.core.ranks import BatchPlan
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.kernels import laid_out_for
from mmpretrain.layers.recompute import Recompute
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.stand_ins import make_batch, make_fake
from mmpretrain.planning.recorder import Collective, Moment, Recorder, Size, Work
from mmpretrain.planning.stand_ins import pretended_world, resolve_model
from mmpretrain.training.parts import batch_fields, model_on_meta


@dataclass(frozen=True)
class Parameters:
    """How many there are."""

    by_part: Mapping[str, int]
    total: int
    trained: int


@dataclass(frozen=True)
class Encoding:
    """One chunk through towers, fusion and heads, and back."""

    forward: Work
    backward: Work
    kept: Size
    """Alive when the forward ends, for the backward."""
    moments: tuple[Moment, ...]
    """How memory rises and falls while gradients come in."""
    inputs: Size
    parts: Size
    """What objectives keep of each chunk for the loss."""


@dataclass(frozen=True)
class Joining:
    """From the parts of all chunks of a rank to the loss over all ranks, and back."""

    forward: Work
    backward: Work
    moments: tuple[Moment, ...]
    collectives: Mapping[Collective, int]


@dataclass(frozen=True)
class Workload:
    """One rank's share of a step."""

    parameters: Parameters
    spans_batch: bool
    rows: int
    """Of a micro-batch."""
    chunks: int
    """Micro-batches of a step."""
    encodings: Mapping[Recompute, Encoding]
    """Activation checkpointing -> a chunk with it: "none", "block", and what the run asks for."""
    joining: Joining
    guessed_words: str | None

    @property
    def encoding(self) -> Encoding:
        """With nothing computed twice."""
        return self.encodings["none"]


def measure(config: RunConfig, plan: BatchPlan, device_type: str = "cuda") -> Workload:
    """Run the model without and with activation checkpointing, laid out for a type of device."""
    resolved = resolve_model(config)
    model = model_on_meta(config, resolved.config)
    fields = batch_fields(config, resolved.config)
    spans = model.spans_batch
    with FakeTensorMode(), laid_out_for(device_type), pretended_world(plan.world.size):
        make_fake(model)
        batch = make_batch(fields, plan.micro)
        asked: set[Recompute] = {"block", config.engine.activation_checkpointing}
        encodings = {recompute: measure_encoding(model, batch, recompute)[0] for recompute in sorted(asked - {"none"})}
        encodings["none"], parts = measure_encoding(model, batch, "none")
        joining = measure_joining(model, parts, plan.micro, plan.accumulation if spans else 1)
    return Workload(
        parameters=count_parameters(model),
        spans_batch=spans,
        rows=plan.micro,
        chunks=plan.accumulation,
        encodings=encodings,
        joining=joining,
        guessed_words=resolved.guessed,
    )


def count_parameters(model: MultimodalTransformer) -> Parameters:
    """By tower, fusion and objective; a projection counts with its tower."""
    seen: set[int] = set()
    by_part: dict[str, int] = {}
    trained = 0
    for name, weight in model.named_parameters():
        if id(weight) not in seen:
            seen.add(id(weight))
            top, _, rest = name.partition(".")
            part = "fusion" if top == "fusion" else f"{'towers' if top == 'projections' else top}.{rest.split('.')[0]}"
            by_part[part] = by_part.get(part, 0) + weight.numel()
            trained += weight.numel() * weight.requires_grad
    return Parameters(by_part, sum(by_part.values()), trained)


def measure_encoding(
    model: MultimodalTransformer, batch: TensorDict, recompute: Recompute
) -> tuple[Encoding, TensorDict]:
    """One chunk forward and backward, and its parts of the loss."""
    model.set_activation_checkpointing(recompute)
    recorder = Recorder([*model.parameters(), *model.buffers()], batch.values())
    hooks = [
        weight.register_post_accumulate_grad_hook(recorder.mark_gradient)  # type: ignore[no-untyped-call]
        for weight in model.parameters()
        if weight.requires_grad
    ]
    with recorder, model.autocast(batch):
        parts = model.encode(batch)
    kept, forward = recorder.live, recorder.take_work()
    learned = [part for part in parts.values() if part.requires_grad]
    outside = [torch.ones_like(part) for part in learned]
    with recorder:
        torch.autograd.backward(learned, outside)
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    measured = Encoding(
        forward=forward,
        backward=recorder.take_work(),
        kept=kept,
        moments=recorder.moments,
        inputs=Size(_bytes(batch.values())),
        parts=Size(_bytes(parts.values())),
    )
    return measured, {name: part.detach() for name, part in parts.items()}


def measure_joining(model: MultimodalTransformer, chunk: TensorDict, rows: int, chunks: int) -> Joining:
    """The loss of `chunks` chunks with parts like these, forward and backward."""
    parts = {name: part.repeat(chunks, *[1] * (part.dim() - 1)) for name, part in chunk.items()}
    for part in parts.values():
        part.requires_grad_(part.is_floating_point())
    scales = {name: torch.ones(()) for name in model.objectives}
    recorder = Recorder([*model.parameters(), *model.buffers()], parts.values())
    with recorder:
        outputs = model.join(parts, scales, rows if chunks > 1 else None)
    forward = recorder.take_work()
    with recorder:
        torch.autograd.backward([outputs["loss"]])
    model.zero_grad(set_to_none=True)
    return Joining(forward, recorder.take_work(), recorder.moments, dict(recorder.collectives))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
