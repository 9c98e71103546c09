"""The things that flow from tar member to report, and the protocols where packages meet.

Frozen dataclasses outside `nn.Module`s; what crosses a module or the engine is a plain dict of tensors,
because ZeRO-3's hooks do not see into dataclasses. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

TensorDict = dict[str, "Tensor"]
Array = NDArray[np.generic]


@dataclass(frozen=True)
class RawSample:
    """One sample as it stands in a shard; (source, shard, ordinal) is its identity, `key` its name."""

    source: str
    shard: str
    ordinal: int
    key: str
    members: Mapping[str, bytes]
    """Extension in lower case without the leading dot -> bytes of that member."""


@dataclass(frozen=True)
class FieldSpec:
    """Shape of one row (without the batch dimension) and NumPy dtype name of a batch field."""

    shape: tuple[int, ...]
    dtype: str
    rate: int | None = None
    """Steps per second of the first axis, where a tower wants its inputs at one rate (samples of audio)."""
    below: int | None = None
    """Values are whole numbers from 0 to below this; None: unbounded."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What a text tower must know of its tokenizer; an id is None where the tokenizer has no such token."""

    vocab_size: int
    pad_id: int
    eos_id: int | None = None
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    """Every special id, those above included: never masked nor predicted."""
    ends_texts: bool = True
    """Whether every text it encodes holds `eos_id`."""


@dataclass(frozen=True)
class Skip:
    """A sample that was not used, and why; one line of the ledger."""

    source: str
    shard: str
    ordinal: int
    key: str
    position: int
    reason: str
    repeat: int = 0
    """How often the row had drawn the same sample before; without it two skips of one row would be one."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    `tensors` holds, for each modality m of the run: its inputs under "m" (and "m.mask" where tokens can be
    padding), and "m.present", bool [B], False for rows that lack the modality. Beside them "position",
    int64 [B], the global sample position, and "draw", int64 [B], the row's random key
    (`core.seeding.row_key(seed, position)`): all that is random about a row follows from it; and "sample", int64 [B],
    the same number wherever the same sample stands. Labels are fields like modalities, with "<label>.present".
    """

    tensors: TensorDict
    keys: tuple[str, ...]
    """Sample keys in row order, "shard-name/key" so that they are unique across shards."""
    skips: tuple[Skip, ...] = ()
    digest: int = 0
    """Of which samples were read for which positions (`data_pipeline.digest`), mod 2**64; those of micro-batches and
    ranks add up."""


@dataclass(frozen=True)
class Picture:
    """Something to look at: a file and the words beneath it."""

    path: Path
    caption: str


Pictures = Mapping[str, Sequence[Picture]]
"""By the name under which trackers show them, e.g. "val/retrieved"."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; immutable, the same on every rank, handed to hooks and trackers."""

    step: int
    """Number of steps finished, this one included; the first report has step 1."""
    samples: int
    """Samples consumed since position 0."""
    metrics: Mapping[str, float]
    """Names of the metric table: "train/loss", "train/loss_<objective>", "train/lr", ..."""
    skipped: bool = False
    """The optimizer left its weights unchanged because a loss or gradient was not finite."""
    keys: tuple[str, ...] = field(default=(), repr=False)
    """Sample keys of the step in global order; gathered when samples are traced or the step was skipped."""
    skips: tuple[Skip, ...] = ()
    """Samples of all ranks that were replaced."""
    digest: int = 0
    """Of what all ranks consumed, mod 2**64."""
    checkpoint_written: bool = False
    """Every rank has written its part of the checkpoint under way."""
    stop_requested: bool = False
    """Some rank was asked to stop: a signal, or the run folder's control/stop."""
    save_requested: bool = False
    """Someone asked for a checkpoint by control/save."""
    evaluate_requested: bool = False
    """Someone asked for an evaluation by control/eval."""
    stacks_requested: bool = False
    """Someone asked by control/stacks what all ranks are doing."""


class Codec(Protocol):
    """The bytes side of a modality: members of a raw sample in, fixed-shape arrays out."""

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """What `decode` returns: names begin with the modality ("image", "text", "text.mask"); "<modality>.present", a
        bool, is among them."""
        ...

    @property
    def extensions(self) -> frozenset[str]:
        """Member extensions this codec reads."""
        ...

    @property
    def required(self) -> bool:
        """Whether a sample needs a member of these extensions; without one it is else a row of zeros, not present."""
        ...

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        """Decode one sample; `draw` seeds augmentation and dropout, None means neither (evaluation).

        Raises SampleError when the sample cannot be used.
        """
        ...
