"""What every objective is: it asks the model for encodings and returns a sum whose count it can tell beforehand.

The loss of a step is sum / count over the whole global batch, whatever the ranks and chunks: each rank reports its
sum, the engine scales by W / count. Counts follow from the batch alone, so they are known before any forward.

Parameters live in small child modules whose own `forward` uses them (ZeRO-3 gathers at module borders); the methods
here are plain methods, so that arguments other than tensors may pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from mmpretrain.core.config import Config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict
from mmpretrain.layers.teacher import Layered
from mmpretrain.objectives.weights import Weight


@dataclass(frozen=True)
class TowerFacts:
    """What an objective's head must know of a tower to be built."""

    width: int
    num_tokens: int
    """Content tokens, the class token not counted."""
    num_prefix: int
    """Tokens before the content (class token): tokens = [prefix, content]."""
    vocab_size: int | None = None
    patch_shape: tuple[int, ...] | None = None
    """Channels and sizes of one patch, e.g. (3, 16, 16); None for towers without patches."""
    patch_grid: tuple[int, ...] | None = None
    """Patches along each axis, e.g. (14, 14), time first; tokens run fastest along the last axis."""
    special_ids: tuple[int, ...] = ()
    """Token ids that are never masked nor predicted (pad, bos, eos, cls, sep, mask)."""
    mask_id: int | None = None
    causal: bool = False
    """Each token sees only earlier ones."""
    num_layers: int = 0
    """Blocks whose outputs `Layered.top_layers` can tell; 0 for towers that tell none."""


def _no_tower(modality: str) -> Layered:
    raise AssertionError(f"these facts came without a model, so there is no tower {modality} to build again")


@dataclass(frozen=True)
class ModelFacts:
    """What an objective may know of the model when it builds its head."""

    embed_dim: int
    towers: Mapping[str, TowerFacts]
    fusion_width: int | None
    """Width of what the fusion gives; None without a fusion."""
    build_tower: Callable[[str], Layered] = _no_tower
    """Another tower like the model's own of that modality, with weights of its own."""


class Encoder(Protocol):
    """The model as objectives see it, for one chunk; equal requests are computed once."""

    @property
    def batch(self) -> TensorDict: ...

    def tower(self, modality: str, *, ids: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        """Run a tower: {"tokens": [B, P + L, D], "mask": bool [B, P + L] if padding, "pooled": [B, D]}.

        `ids`, int64 [B, L], replaces a text tower's ids (masked language modelling); `keep`, int64 [B, K], lets a
        native patch tower see only those content tokens (masked autoencoding).
        """
        ...

    def embed(self, modality: str) -> Tensor:
        """The clean projection of a modality: fp32 [B, embed_dim] of unit norm."""
        ...

    def fuse(self, outputs: Mapping[str, TensorDict]) -> TensorDict:
        """Run the fusion over tower outputs: {m: [B, P + L_m, D], "pooled": [B, D]}.

        What stands in rows that lack a modality is masked."""
        ...

    def vocabulary_logits(self, modality: str, hidden: Tensor) -> Tensor:
        """Score hidden states [N, D] of a text tower's width against its word embeddings: [N, vocab], for tied heads.

        A forward of the embedding module itself, so that ZeRO-3 gathers the matrix.
        """
        ...

    def patches(self, modality: str) -> Tensor:
        """The inputs cut as the stem cuts them, normalised, fp32: [B, L, prod(patch_shape)]."""
        ...


@dataclass(frozen=True)
class Rebuilt:
    """Inputs of rows, cut as the stem cuts them, and what an objective predicts in place of those it hid."""

    modality: str
    patches: Tensor
    """[B, L, prod(patch_shape)], normalised."""
    predicted: Tensor
    """The same with predictions at the hidden patches."""
    hidden: Tensor
    """bool [B, L]."""


class FuseRows(Protocol):
    """The model's fusion over rows that an objective put together itself, under the run's autocast."""

    def __call__(self, outputs: Mapping[str, TensorDict]) -> TensorDict:
        """{m: {"tokens": [N, P + L_m, D_m], "mask": bool [N, P + L_m], "pooled": [N, D_m]}} to what a fusion gives."""
        ...


class Average(Protocol):
    """Moves the weights of one network towards those of another, however the engine divides them over ranks."""

    def __call__(self, average: nn.Module, network: nn.Module, keep: float) -> None:
        """average = keep * average + (1 - keep) * network, for all parameters; buffers are copied. Communicates."""
        ...


class Objective(nn.Module):
    """A loss with its head. Shape legend: b rows of a chunk, B rows of the rank in the step, W ranks."""

    spans_batch: ClassVar[bool] = False
    """True when a row's loss depends on other rows: the rank's whole share then runs in one engine forward."""
    scaffolding: ClassVar[tuple[str, ...]] = ()
    """Child modules that training alone needs: no gradient changes their weights, and a published model lacks them."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """Modalities in sight while something else is predicted: evaluation tells what each is worth."""
        return ()

    @abstractmethod
    def count(self, batch: TensorDict) -> Tensor:
        """Number of targets in these rows, fp32 [], from the batch alone, no gradient, no communication."""

    @abstractmethod
    def encode(self, encoder: Encoder) -> TensorDict:
        """Work on one chunk. An objective of independent rows returns {"sum": fp32 [1]}; one that spans the batch
        returns row-aligned tensors [b, ...] that are concatenated over chunks before `reduce`."""

    def reduce(self, parts: TensorDict) -> Tensor:
        """Turn concatenated parts into this rank's sum, fp32 []. May communicate (every rank calls it in lockstep);
        gradient flows through the communication. May add detached entries to `parts` for `metrics`."""
        return parts["sum"].sum()

    def reduce_fused(self, parts: TensorDict, fuse: FuseRows) -> Tensor:
        """What the model calls: `reduce`, but for an objective that fuses rows of different samples."""
        return self.reduce(parts)

    def metrics(self, parts: TensorDict) -> TensorDict:
        """Further scalars to log (fp32 [], already global), without gradient, e.g. {"embed/pos_sim": ...}.

        Names without a slash stand under "train/". Called after `reduce` with the same dict, by every rank in lockstep:
        may communicate, and may read what `reduce` left in the dict."""
        return {}

    def rebuild(self, encoder: Encoder) -> Rebuilt | None:
        """What it makes of the patches it hid, to look at; None for objectives that predict nothing one could see.

        Runs the model as `encode` does: every rank calls it in lockstep."""
        return None

    def after_step(self, step: int, towers: Mapping[str, nn.Module], average: Average) -> None:
        """Called after each optimizer step that changed the weights, with the number of steps done, and once with 0
        before the first step of a run; every rank calls it in lockstep. Gradients are no longer there."""
        return


class ObjectiveConfig(Config):
    """Config of an objective; subclasses add `kind: Literal[...]`."""

    weight: Weight = 1.0
    """Factor of this objective in the total loss: a number, or a list of points {from_step, weight} between which it
    runs straight."""

    @property
    @abstractmethod
    def modalities(self) -> tuple[str, ...]:
        """Towers the objective needs; a config that names an absent one is refused."""

    @property
    def needs_fusion(self) -> bool:
        """Whether the objective reads fused tokens; a config whose fusion gives none is then refused."""
        return False

    @property
    def needs_pooled(self) -> bool:
        """Whether the objective reads the fused pooled vector; a config whose fusion gives none is then refused."""
        return False

    @property
    def input_fields(self) -> Mapping[str, FieldSpec]:
        """Batch fields read beside the towers' inputs (labels): name -> one row. A codec of that name must make each;
        "<name>.present" tells the rows that have it."""
        return {}

    @property
    def fixed_grids(self) -> tuple[str, ...]:
        """Modalities whose grid of patches must stay as it is over the steps; a config that changes one is refused."""
        return ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The modalities and labels the objective reads."""
        return (*self.modalities, *self.input_fields)

    def counts_with(self, held: Set[str]) -> bool:
        """Whether a sample that holds these modalities and labels can have targets; else it weighs nothing."""
        return held >= set(self.reads)

    def expand(self, name: str, modalities: Iterable[str]) -> Mapping[str, ObjectiveConfig]:
        """The objectives that this entry stands for in a model of these towers, by name; most stand for themselves."""
        return {name: self}

    @abstractmethod
    def build(self, facts: ModelFacts) -> Objective:
        """A freshly initialised objective with its head."""


def expand_all(objectives: Mapping[str, ObjectiveConfig], modalities: Iterable[str]) -> dict[str, ObjectiveConfig]:
    """Every objective that the entries of a config stand for; raises ConfigError where two would have one name."""
    expanded: dict[str, ObjectiveConfig] = {}
    towers = tuple(modalities)
    for name, entry in objectives.items():
        for each, objective in entry.expand(name, towers).items():
            if each in expanded:
                raise ConfigError(f"two objectives would be called {each}; rename one of the entries")
            expanded[each] = objective
    return expanded
