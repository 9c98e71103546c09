"""What every evaluation task is: a config with `run(context)`, which returns figures by name.

Enter: an EvaluationContext that the composition root builds once. Leave: {"val/i2t_r@1": 0.71, ...}, the same on every
rank. Tasks communicate: every rank calls `run`, with as many model calls as its peers, so that a partitioned model
can gather its weights; a rank that has fewer rows calls with stand-ins whose results are dropped.

To wire a context: `model` is the bare module (its methods are called under no_grad, in eval mode, which the caller
sets); `rows(shards, max_samples)` yields this rank's part of the named shards (None: the training shards) in shard
order, decoded with `draw=None`, in micro-batches of any size. Each sample stands on exactly one rank; parts may differ
in size.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mmpretrain.core.config import Config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import key_of, sample_key
from mmpretrain.core.types import Array, Codec, Picture, TensorDict
from mmpretrain.evaluation.lockstep import in_step
from mmpretrain.modalities.base import PresenceCodec
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig

EVALUATION_SEED = 0


@runtime_checkable
class CaptionCodec(Protocol):
    """The text codec as evaluation uses it: all captions of a sample, and ids of any text."""

    def captions(self, members: Mapping[str, bytes]) -> list[str]: ...

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        """The batch fields of these texts, stacked: {"text": int64 [n, L], "text.mask": bool [n, L]}."""
        ...


@dataclass(frozen=True)
class Rows:
    """Some samples of this rank: decoded tensors on the CPU, their keys, and their undecoded members."""

    tensors: TensorDict
    keys: tuple[str, ...]
    members: tuple[Mapping[str, bytes], ...]


@dataclass(frozen=True)
class EvaluationContext:
    """All that a task may use."""

    model: MultimodalTransformer
    codecs: Mapping[str, Codec]
    rows: Callable[[Sequence[str] | None, int | None], Iterator[Rows]]
    """(shards or None for the training shards, at most so many samples over all ranks) -> this rank's samples."""
    device: torch.device
    run_dir: Path | None = None
    """Where a task leaves files, under `evaluation/`; None: it leaves none."""
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    """What tasks leave there to look at, by name; the main rank's."""

    def embed(self, modality: str, fields: TensorDict) -> Tensor:
        """Unit embeddings, fp32 [B, embed_dim] on the device, of a modality's batch fields."""
        mask = fields.get(f"{modality}.mask")
        inputs = fields[modality].to(self.device, non_blocking=True)
        with torch.no_grad():
            return self.model.embed(modality, inputs, None if mask is None else mask.to(self.device)).float()

    def pooled(self, modality: str, fields: TensorDict) -> Tensor:
        """What the tower of a modality makes of a row, before any projection: fp32 [B, width] on the device."""
        inputs = {name: fields[name].to(self.device) for name in (modality, f"{modality}.mask") if name in fields}
        with torch.no_grad(), self.autocast():
            return self.model.encoder(inputs).tower(modality)["pooled"].float()

    def autocast(self) -> AbstractContextManager[object]:
        """The precision in which the model computes in training."""
        dtype = self.model.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def has_captions(self, modality: str) -> bool:
        """Whether the modality is text, of which a sample may have several."""
        return isinstance(self._decoder(modality), CaptionCodec)

    def text(self, modality: str) -> CaptionCodec:
        """The codec of a modality that has captions."""
        decoder = self._decoder(modality)
        if not isinstance(decoder, CaptionCodec):
            raise ConfigError(
                f"evaluation needs captions of {modality!r}, whose codec offers none; "
                f"name a text modality (the run has {sorted(self.codecs)})"
            )
        return decoder

    def _decoder(self, modality: str) -> object:
        """What is particular to the modality in its codec."""
        codec = self.codecs.get(modality)
        return codec.decoder if isinstance(codec, PresenceCodec) else codec

    def turns(self, task: "TaskConfig") -> Iterator[Rows | None]:
        """The task's rows of this rank, or None in a turn in which only others have some. Communicates."""
        yield from self.turns_of(task.shards, task.max_samples)

    def turns_of(self, shards: Sequence[str] | None, max_samples: int | None) -> Iterator[Rows | None]:
        """The same for any shards. Communicates."""
        for rows in in_step(self.rows(shards, max_samples), self.device):
            yield rows if rows is not None and rows.keys else None

    def batch(self, rows: Rows | None) -> TensorDict:
        """Rows on the device with random keys that follow from their names, as objectives want them; None: one row
        that has no modality and no label, and so counts nothing."""
        if rows is None:
            tensors = {field: value for name in self.codecs for field, value in self.stand_in(name).items()}
            tensors |= {f"{name}.present": torch.zeros(1, dtype=torch.bool) for name in self.codecs}
        else:
            tensors = dict(rows.tensors)
        keys = [""] if rows is None else rows.keys
        tensors["draw"] = torch.tensor([key_of(EVALUATION_SEED, "evaluation", key) >> 1 for key in keys])
        tensors["sample"] = torch.tensor([sample_key(key) for key in keys])
        return {name: value.to(self.device) for name, value in tensors.items()}

    def stand_in(self, modality: str) -> TensorDict:
        """One row of a modality's fields, for a call whose result is dropped."""
        return {
            name: torch.from_numpy(np.ones((1, *spec.shape), dtype=spec.dtype))
            for name, spec in self.codecs[modality].fields.items()
        }


class TaskConfig(Config):
    """Config of an evaluation task; subclasses add `kind: Literal[...]`."""

    shards: list[str] | None = None
    """Folders, globs or tars to evaluate on; null: the training shards."""
    max_samples: int | None = None
    """Stop after so many samples over all ranks; null: all of them."""
    prefix: str = "val"
    """Figures are named "<prefix>/...": give each task on other data its own."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """Towers the task needs; a config that names an absent one is refused."""

    @property
    def shard_sets(self) -> tuple[list[str] | None, ...]:
        """All that it reads; None stands for the training shards."""
        return (self.shards,)

    def faults(self, towers: Collection[str], objectives: Mapping[str, ObjectiveConfig]) -> Iterator[str]:
        """Why it cannot run on a model of these parts, each with what to do; called when a config is read."""
        yield from ()

    def figure_groups(self, towers: Collection[str]) -> frozenset[str]:
        """What its figures are about: tasks of one kind and prefix that share such a group would share names."""
        return frozenset({", ".join(self.modalities)})

    def check_files(self) -> None:
        """Refuse files of the task, besides its shards, that cannot be used; called before training begins."""
        return

    def check_model(self, model: MultimodalTransformer) -> None:
        """Refuse a model whose parts, once built, turn out not to fit; called before training begins."""
        return

    @abstractmethod
    def run(self, context: EvaluationContext) -> dict[str, float]:
        """Evaluate; communicates. Every rank returns the same figures."""

    def named(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The figures under the task's prefix."""
        return {f"{self.prefix}/{name}": float(value) for name, value in figures.items()}
