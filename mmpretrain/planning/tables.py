"""A plan as tables for people.

Enter: a `Plan`. Leave: rich tables and lines. Refuses nothing.
"""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from mmpretrain.planning.memory import GIB
from mmpretrain.planning.plan import Plan

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "masters and moments",
    "buffers": "reduction buffers",
    "live_weights": "weights gathered at once",
    "inputs": "inputs",
    "activations": "activations",
    "features": "features and loss tiles",
}


def show(plan: Plan) -> Iterator[RenderableType]:
    """Everything, top down."""
    yield (
        f"{plan.gpus} x {plan.gpu.upper()}, {plan.global_batch} samples a step: "
        f"{plan.micro_batches} micro-batches of {plan.micro_batch} on each GPU, {plan.steps} steps"
    )
    yield _parameters(plan)
    yield _memory(plan)
    yield _flops(plan)
    yield _time(plan)
    yield _demands(plan)
    if plan.advice:
        yield _advice(plan)
    for note in plan.notes:
        yield f"note: {note}"


def _parameters(plan: Plan) -> Table:
    rows = [(name, f"{count:,}") for name, count in sorted(plan.parameters.by_part.items())]
    rows.append(("all", f"{plan.parameters.total:,}"))
    if plan.parameters.trained != plan.parameters.total:
        rows.append(("that learn", f"{plan.parameters.trained:,}"))
    return _table("Parameters", ("part", "number"), rows)


def _memory(plan: Plan) -> Table:
    heading = ("GiB on each GPU", *(_stage_name(plan, fit.stage) for fit in plan.stages))
    rows = [
        (name, *(_gib(fit.memory.by_part[part]) for fit in plan.stages))
        for part, name in _PARTS.items()
        if any(fit.memory.by_part[part] for fit in plan.stages)
    ]
    rows.append(("all", *(_gib(fit.memory.total) for fit in plan.stages)))
    rows.append((f"fits into {plan.capacity / GIB:.1f}", *("yes" if fit.fits else "no" for fit in plan.stages)))
    rows.append(("largest micro-batch", *(str(fit.largest_micro_batch or "none") for fit in plan.stages)))
    return _table("Memory", heading, rows)


def _stage_name(plan: Plan, stage: int) -> str:
    return f"ZeRO {stage}{' *' if stage == plan.zero_stage else ''}"


def _flops(plan: Plan) -> Table:
    flops = plan.flops
    once = flops.forward + flops.backward
    rows = [
        ("forward", _giga(flops.forward)),
        ("backward", _giga(flops.backward)),
        ("both", _giga(once)),
        ("both, with activation checkpointing", _giga(once + flops.recomputed)),
    ]
    return _table("Arithmetic of a sample", ("", "GFLOP"), rows)


def _time(plan: Plan) -> Table:
    time = plan.time
    rows = [
        ("forward", _ms(time.forward)),
        ("backward", _ms(time.backward)),
        ("loss over all GPUs", _ms(time.loss)),
        ("update", _ms(time.update)),
        *((f"communication of {name}", _ms(seconds)) for name, seconds in time.communication.items()),
        ("of it beside the backward", _ms(-time.hidden)),
        ("step", _ms(time.total)),
        ("samples/s", f"{plan.samples_per_s:,.0f}"),
        ("MFU", f"{plan.mfu:.1%}"),
    ]
    return _table("A step", ("", "ms"), rows)


def _demands(plan: Plan) -> Table:
    days = plan.gpu_hours / plan.gpus / 24
    rows = [
        ("samples/s that each node reads", f"{plan.node_samples_per_s:,.0f}"),
        ("cores that decode them", f"{plan.decoding_cores:,.1f}"),
        ("GPU-hours", f"{plan.gpu_hours:,.0f} ({days:,.1f} days)"),
        ("checkpoint", f"{plan.checkpoint_bytes / GIB:.2f} GiB"),
    ]
    return _table("The run", ("", ""), rows)


def _advice(plan: Plan) -> Table:
    rows = [(each.change, _gib(each.bytes), "yes" if each.fits else "no", _ms(each.seconds)) for each in plan.advice]
    taken = f"{_gib(plan.chosen.memory.total)} of {_gib(plan.capacity)} GiB"
    title = f"It fits, {taken}; faster" if plan.chosen.fits else f"It does not fit, {taken}; what would help"
    return _table(title, ("change", "GiB", "fits", "ms a step"), rows)


def _table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*heading[:1], title=title, title_justify="left", box=None, show_header=any(heading))
    for name in heading[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.2f}"
