"""When checkpoints are written and which of them stay.

Enter: the `checkpoint:` part of a run config. Leave: `CheckpointConfig`. Refuses rules that would keep nothing, and
places that are no object store.
"""

import math
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt

from mmpretrain.core.config import Config, Rule

UPLOAD_SCHEMES = ("s3", "gs", "gcs")


class BestConfig(Config):
    """Which checkpoints count as the best."""

    metric: str = Field(min_length=1)
    """A figure of metrics.jsonl, e.g. val/i2t_r@1, as it stands there for the step of the checkpoint."""
    mode: Literal["max", "min"]
    """Whether a large or a small figure is good."""
    count: PositiveInt = 1
    """How many of the best stay."""


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
    keep_best: BestConfig | None = None
    """The best stay too, e.g. {metric: val/i2t_r@1, mode: max}; null: none."""
    upload: str | None = None
    """A folder of an object store, such as s3://bucket/runs, in which a folder of the run's name is to hold a copy of
    each checkpoint, brought there beside training; nothing is deleted there. A run whose own folder holds no checkpoint
    continues from the newest one there; null: none."""
    upload_wait_s: float = Field(600.0, gt=0, le=1500)
    """Seconds that the end of the run waits for copies that are not there yet; a run that is stopped waits for none."""

    def broken_rules(self) -> Iterator[Rule]:
        if self.keep_every is not None and self.keep_every % self.every:
            yield (
                ("keep_every",),
                f"{self.keep_every} is not a multiple of checkpoint.every {self.every}, so some would never be "
                f"written; use {math.ceil(self.keep_every / self.every) * self.every}",
            )
        if self.upload is not None and (fault := _fault_of(self.upload)):
            yield ("upload",), fault


def _fault_of(url: str) -> str | None:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        return "names credentials, which every copy of the config shows; leave them where its client looks for them"
    if parts.scheme not in UPLOAD_SCHEMES or not parts.netloc:
        known = ", ".join(f"{scheme}://" for scheme in UPLOAD_SCHEMES)
        return f"{url!r} is no folder of an object store ({known}); write e.g. s3://bucket/runs"
    return None
