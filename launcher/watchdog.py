"""Whether a run still moves: its heartbeat against the time limit of the phase it is in.

Enter: heartbeats as they are read, and this machine's own clock. Leave: a stall, or nothing. A heartbeat counts when
its content changes, so clocks of different nodes are never compared.
"""

from dataclasses import dataclass

from launcher.spec import Limits
from mmpretrain.core.run_files import Heartbeat, Phase


@dataclass(frozen=True)
class Stall:
    """A phase that took too long."""

    phase: Phase
    seconds: float
    limit_s: float

    def __str__(self) -> str:
        return f"no sign of life for {self.seconds:.0f} s in phase {self.phase} (limit {self.limit_s:g} s)"


class Watchdog:
    """Follows one attempt."""

    def __init__(self, limits: Limits, before: Heartbeat | None, now: float) -> None:
        self.limits = limits
        self.newest = before
        self.changed = now
        self.first_step_at: float | None = None
        self._phase: Phase = "start"

    def look(self, heartbeat: Heartbeat | None, now: float) -> Stall | None:
        """Take in the heartbeat as it stands at time `now` (seconds of a clock that never jumps)."""
        if heartbeat is not None and heartbeat != self.newest:
            self.newest, self.changed = heartbeat, now
            self._phase = heartbeat.phase
            if self.first_step_at is None and heartbeat.phase == "step":
                self.first_step_at = now
        limit = self.limits.of(self._phase)
        silent = now - self.changed
        return Stall(self._phase, silent, limit) if silent > limit else None
