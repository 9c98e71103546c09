"""How far a run is, in words, from its heartbeat.

Enter: a heartbeat. Leave: a line for the scheduler's comment, and durations as people read them.
"""

from mmpretrain.core.run_files import Heartbeat


def progress_line(heartbeat: Heartbeat) -> str:
    """E.g. "step 1200/50000 loss 2.310 3.1k samples/s left 4 h 12 min"."""
    parts = [f"step {heartbeat.step}/{heartbeat.last_step}"]
    if heartbeat.loss is not None:
        parts.append(f"loss {heartbeat.loss:.4g}")
    if heartbeat.samples_per_s is not None:
        parts.append(f"{heartbeat.samples_per_s:.4g} samples/s")
    if (left := seconds_left(heartbeat)) is not None:
        parts.append(f"left {duration(left)}")
    if heartbeat.phase != "step":
        parts.append(f"({heartbeat.phase})")
    return " ".join(parts)


def seconds_left(heartbeat: Heartbeat) -> float | None:
    """At the rate of the newest step; None before the first."""
    if heartbeat.step_s is None:
        return None
    return (heartbeat.last_step - heartbeat.step) * heartbeat.step_s


def counted(number: int, noun: str) -> str:
    """E.g. 1 step, 3 steps."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """E.g. 42 s, 3 min 20 s, 4 h 12 min, 2 d 3 h."""
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"
