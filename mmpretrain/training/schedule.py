"""The learning rate as a pure function of the step, so that nothing of it needs saving.

Enter: a step (from 0) and the schedule's settings. Leave: the learning rate of that step.
"""

import math

from mmpretrain.config import RunConfig, ScheduleConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The rate used in step `step`, counted from 0: linear warmup, then a decay that would end at step `steps`."""
    return config.optimizer.lr * _factor(config.schedule, step, config.steps, config.global_batch_size)


def _factor(schedule: ScheduleConfig, step: int, steps: int, global_batch: int) -> float:
    warmup = schedule.warmup if schedule.unit == "steps" else math.ceil(schedule.warmup / global_batch)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = schedule.final_fraction
    if schedule.kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "linear":
        return floor + (1 - floor) * (1 - progress)
    return 1.0
