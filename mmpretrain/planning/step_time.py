"""How long a step takes, by a roofline: each kernel as long as the longer of its arithmetic and its memory traffic.

Enter: a workload, a setting and a machine. Leave: seconds by part, and the share of the GPU's peak (MFU). Left out are
starts of kernels, which count where batches are small, slow ranks, and waiting for data: the forecast is a bound that a
good run comes near to. Refuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmpretrain.planning.communication import Message, Network, messages
from mmpretrain.planning.machines import Machine, Rates
from mmpretrain.planning.memory import Setting, chunks_of
from mmpretrain.planning.recorder import Operation, Work
from mmpretrain.planning.workload import Workload

UPDATE_BYTES = 28
"""Memory traffic of AdamW for each weight: master, gradient and moments read, all but the gradient written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one rank."""

    forward: float
    backward: float
    """What is computed again for it included."""
    loss: float
    update: float
    communication: dict[str, float]
    """By purpose, whether hidden or not."""
    hidden: float
    """Of it, what runs while the backward goes on."""

    @property
    def exposed(self) -> float:
        return sum(self.communication.values()) - self.hidden

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.loss + self.update + self.exposed


def work_seconds(work: Work, rates: Rates) -> float:
    """Kernels one after the other."""
    return sum(count * _operation_seconds(operation, rates) for operation, count in work.items())


def _operation_seconds(operation: Operation, rates: Rates) -> float:
    rate = rates.gemm_fp32
    if operation.half:
        rate = rates.attention if operation.kind == "attention" else rates.gemm
    return max(operation.flops / rate, operation.bytes / rates.memory)


def step_time(workload: Workload, setting: Setting, machine: Machine) -> StepTime:
    """Of a step; micro-batches of another size than was measured take as long for each row."""
    encoding, rates = workload.encodings[setting.recompute], machine.rates
    forward = workload.chunks * work_seconds(encoding.forward, rates)
    backward = workload.chunks * work_seconds(encoding.backward, rates)
    if workload.spans_batch:  # all chunks but the last are computed again
        backward += forward * (1 - 1 / chunks_of(workload, setting))
    loss = work_seconds(workload.joining.forward, rates) + work_seconds(workload.joining.backward, rates)
    updated = workload.parameters.trained / (setting.ranks if setting.stage else 1)
    network = machine.network(setting.ranks)
    sent = [(message, _message_seconds(message, network, setting.ranks)) for message in messages(workload, setting)]
    purposes = ("features", "gradients", "weights")
    return StepTime(
        forward=forward,
        backward=backward,
        loss=loss * (1 if workload.spans_batch else workload.chunks),
        update=UPDATE_BYTES * updated / rates.memory,
        communication={p: sum(s for message, s in sent if message.purpose == p) for p in purposes},
        hidden=min(backward, sum(s for message, s in sent if message.hidden)),
    )


def _message_seconds(message: Message, network: Network, ranks: int) -> float:
    return message.count * network.seconds(message.collective, ranks)


def model_flops(workload: Workload) -> float:
    """Of one sample forward and backward, without what is computed twice."""
    once = workload.encoding.forward.flops + workload.encoding.backward.flops
    joined = workload.joining.forward.flops + workload.joining.backward.flops
    return once / workload.rows + joined / (workload.rows * (workload.chunks if workload.spans_batch else 1))
