"""Which share of a piece of work one of several tasks does.

Enter: "3/16", the fourth of sixteen. Leave: every sixteenth item from the fourth on. Refused: what is no such share.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mmpretrain.core.errors import ConfigError

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Part:
    """Task `number`, from 0, of `of`."""

    number: int
    of: int

    def take(self, items: Sequence[ItemT]) -> list[ItemT]:
        """The items of this part; all parts together have each once."""
        return list(items[self.number :: self.of])


def parse_part(text: str) -> Part:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = Part(int(match[1]), int(match[2])) if match else None
    if part is None or part.number >= part.of:
        raise ConfigError(f"--part is {text!r}; write NUMBER/OF with numbers from 0, e.g. 0/16 to 15/16")
    return part
