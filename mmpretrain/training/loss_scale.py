"""How far a loss is scaled up so that fp16 holds its small gradients (Micikevicius et al., arXiv 1710.03740, 3.2).

Enter: whether a step was skipped. Leave: the scale of the next one. It halves with every step whose gradients
overflowed, and doubles after 2,000 without one, as in PyTorch's `GradScaler`.
"""

from dataclasses import dataclass

FIRST = 2.0**16
PATIENCE = 2000
"""Steps without an overflow after which more is tried."""


@dataclass(frozen=True)
class LossScale:
    """The scale, and how long it has held; ValueError where no run can have come to it."""

    value: float = FIRST
    steps: int = 0
    """Steps since it last changed."""

    def __post_init__(self) -> None:
        if not 1 <= self.value < float("inf") or self.steps < 0:
            raise ValueError(f"{self} is no loss scale")

    def after(self, skipped: bool) -> "LossScale":
        """That of the step that follows one at this scale."""
        if skipped:
            return LossScale(max(1.0, self.value / 2))
        return LossScale(self.value, self.steps + 1) if self.steps + 1 < PATIENCE else LossScale(self.value * 2)
