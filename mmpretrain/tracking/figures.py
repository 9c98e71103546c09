"""Figures as people read them, and the losses of single objectives among a run's metrics.

Enter: floats, metrics by name. Leave: short text; {objective: loss}.
"""

import math
from collections.abc import Mapping

_OBJECTIVE = "train/loss_"
_NO_OBJECTIVE = "train/loss_max_rank"


def significant(value: float, digits: int = 3) -> str:
    """A figure as people write it: 2.31, 0.500, 9.8e-4, 1,234."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.{digits - 1}e}"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:#.{digits}g}".rstrip(".")


def duration(seconds: float) -> str:
    """1:23, 12:05 or 3:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def objective_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Loss of each objective by its name."""
    return {
        name.removeprefix(_OBJECTIVE): value
        for name, value in metrics.items()
        if name.startswith(_OBJECTIVE) and name != _NO_OBJECTIVE
    }
