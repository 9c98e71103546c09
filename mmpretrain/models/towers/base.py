"""What every tower is: one modality's inputs in, tokens and one pooled vector out.

Enter: batch fields as the codec made them. Leave: a dict of tensors of the tower's width. Refused: a modality the
tower cannot read. Shape legend: B rows, L content tokens, P prefix tokens, D width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from mmpretrain.core.config import Config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TensorDict, TokenizerFacts
from mmpretrain.layers.teacher import Layered
from mmpretrain.objectives.base import TowerFacts


class Tower(Layered):
    """The encoder of one modality."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> TensorDict:
        """Map inputs to {"tokens": [B, P + L, D], "mask": bool [B, P + L] if any, "pooled": [B, D]}.

        `mask`, bool [B, L], is True where a token counts; `keep`, int64 [B, K], leaves only those content tokens.
        """
        raise NotImplementedError

    def facts(self) -> TowerFacts:
        """What objectives may know of this tower."""
        raise NotImplementedError

    def columns(self, inputs: Tensor, mask: Tensor) -> int:
        """How many of the first columns of inputs [B, L] the tower must see, so that all it says of tokens that count
        stays what it is; all of them where padding matters. Looks at values, so call it before they go to a device."""
        return inputs.shape[1]

    def kept_tokens(self, draw: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which content tokens of rows with these keys, int64 [B], a step shows to the tower: int64 [B, K]; None: all.

        `mask` is that of the inputs, as for `forward`."""
        return None

    def top_layers(self, inputs: Tensor, mask: Tensor | None, number: int) -> list[Tensor]:
        raise ConfigError(f"{type(self).__name__} does not tell what its layers say; use a native tower")

    def load_pretrained(self) -> None:
        """Take over the weights the config names, once, when a model is created; most towers have none."""

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in the order in which tokens pass them; by default all of the class of which the longest list is,
        since some encoders have a list for each stage."""
        lists = [module for module in self.modules() if isinstance(module, nn.ModuleList)]
        alike = [list(each) for each in lists if len({type(module) for module in each}) == 1]
        longest = max(alike, key=len, default=[])
        return [module for module in self.modules() if type(module) in {type(block) for block in longest}]

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Score hidden states [N, D] against the word embeddings: [N, vocab]."""
        raise ConfigError(f"{type(self).__name__} has no word embeddings to score against; choose a text tower")

    def patches(self, inputs: Tensor) -> Tensor:
        """The inputs cut as the stem cuts them, normalised, fp32: [B, L, prod(patch_shape)]."""
        raise ConfigError(
            f"{type(self).__name__} does not cut its inputs into patches; use a native tower with a patch stem"
        )


class TowerConfig(Config):
    """Config of a tower; subclasses add `kind: Literal[...]`."""

    projection: bool = True
    """Project the pooled vector to `embed_dim`; false where the pooled vector is the embedding (SigLIP)."""
    projection_bias: bool = False
    """Give the projection a bias (SigLIP's text head)."""

    @property
    def last_phase(self) -> int:
        """Step from which on the tower trains on all of its inputs, or on as much of them as it ever does."""
        return 0

    @property
    def changes_grid(self) -> bool:
        """Whether the grid of patches changes over the steps."""
        return False

    def check(self, modality: str) -> None:
        """Raise ValueError when this tower cannot stand under the name `modality`."""
        return

    def resolve(self, modality: str, tokenizer: TokenizerFacts | None) -> Self:
        """This config with what it left to the tokenizer, or to a folder of weights, written into it."""
        return self

    def reads_elsewhere(self, modality: str) -> bool:
        """Whether building the tower would read a folder of weights or the hub, because it was never resolved."""
        return False

    @abstractmethod
    def input_field(self, modality: str) -> FieldSpec:
        """Shape and dtype of one input row: what the codec must produce."""

    @abstractmethod
    def build(self, modality: str) -> Tower:
        """The tower, freshly initialised; never reads files once the config is resolved."""
