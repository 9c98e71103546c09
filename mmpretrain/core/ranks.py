"""Pure rank arithmetic: which rank this is, and which positions of a step it holds. Never imports torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mmpretrain.core.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among its peers, as torchrun describes it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_env(env: Mapping[str, str] | None = None) -> World:
    """Read torchrun's variables; without them this is a run of one process."""
    env = os.environ if env is None else env
    return World(
        rank=int(env.get("RANK", "0")),
        size=int(env.get("WORLD_SIZE", "1")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
    )


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch divides over ranks and micro-batches.

    Rank r holds the contiguous positions [t G + r G/W, t G + (r+1) G/W) of step t (counted from 0), cut into
    `accumulation` micro-batches of `micro` rows.
    """

    global_batch: int
    micro: int
    world: World

    def __post_init__(self) -> None:
        per_step = self.micro * self.world.size
        if self.global_batch % per_step:
            raise ConfigError(
                f"global_batch_size {self.global_batch} is not a multiple of micro_batch_size {self.micro} x "
                f"{self.world.size} ranks = {per_step}; choose a micro_batch_size that divides "
                f"{self.global_batch} / {self.world.size}"
            )

    @property
    def rows(self) -> int:
        """Rows of one rank in one step."""
        return self.global_batch // self.world.size

    @property
    def accumulation(self) -> int:
        return self.rows // self.micro

    def micro_positions(self, step: int, index: int) -> range:
        """Global positions of micro-batch `index` of `step` (both from 0) on this rank."""
        start = step * self.global_batch + self.world.rank * self.rows + index * self.micro
        return range(start, start + self.micro)
