"""When checkpoints are written and which of them stay.

Enter: the `checkpoint:` part of a run config. Leave: `CheckpointConfig`. Refuses rules that would keep nothing.
"""

import math
from collections.abc import Iterator

from pydantic import PositiveInt

from mmpretrain.core.config import Config, Rule


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every: PositiveInt = 500
    """Steps between checkpoints; the last step and a requested stop are saved as well."""
    background: bool = True
    """Go on training while a checkpoint is written, from a copy of all it holds in the memory of the host. A rank then
    keeps room for its part of the state; false: every checkpoint is waited for, and the room given back."""
    keep_last: PositiveInt = 2
    """How many of the newest stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of so many steps stay for good; null: none."""

    def broken_rules(self) -> Iterator[Rule]:
        if self.keep_every is not None and self.keep_every % self.every:
            yield (
                ("keep_every",),
                f"{self.keep_every} is not a multiple of checkpoint.every {self.every}, so some would never be "
                f"written; use {math.ceil(self.keep_every / self.every) * self.every}",
            )
