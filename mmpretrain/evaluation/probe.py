"""Linear probe: multinomial logistic regression on frozen features (as in CLIP, arXiv 2103.00020, section 3.2).

Enter: frozen unit vectors with labels. Leave: "probe_<modality>_top1" and its mean over classes, with the share of the
most frequent class as chance. Features are standardised by the training samples; the mean cross-entropy plus l2 / 2
times the squared weights (biases are free) is convex, and L-BFGS in float64 finds its one minimum, whatever the ranks.
"""

import logging
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.core.collectives import all_reduce_sum
from mmpretrain.evaluation.features import Labelled, ProbeTaskConfig

log = logging.getLogger(__name__)
GRADIENT_TOLERANCE = 1e-6
"""The minimum counts as found where no derivative is larger."""
_SMALLEST_STD = 1e-6
"""Directions that vary less carry rounding alone: they are not blown up to unit variance."""


class LinearProbeConfig(ProbeTaskConfig):
    """Logistic regression on frozen features."""

    kind: Literal["probe"] = "probe"
    l2: float = Field(1e-3, gt=0)
    """Half the factor of the squared weights; scikit-learn's C is 1 / (l2 * training samples)."""
    max_iterations: int = Field(500, gt=0)
    """Steps of L-BFGS; a probe that needs more says so and is judged as it is."""

    @property
    def figure(self) -> str:
        return "probe"

    def guesses(self, train: Labelled, test: Tensor, num_classes: int) -> Tensor:
        mean, scale = moments(train.vectors)
        standard = Labelled((train.vectors.double() - mean) / scale, train.classes)
        weights = fit(standard, num_classes, self.l2, self.max_iterations)
        return (with_one((test.double() - mean) / scale) @ weights).argmax(dim=1)


def moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] of the vectors of all ranks, in float64. Communicates."""
    vectors = vectors.double()
    count = all_reduce_sum(torch.tensor(float(len(vectors)), dtype=torch.float64, device=vectors.device))
    mean = all_reduce_sum(vectors.sum(dim=0)) / count
    variance = all_reduce_sum((vectors - mean).square().sum(dim=0)) / count
    return mean, variance.sqrt().clamp_min(_SMALLEST_STD)


def with_one(vectors: Tensor) -> Tensor:
    """[n, D + 1]: a one at the end of each vector, for the bias."""
    return F.pad(vectors, (0, 1), value=1.0)


def fit(train: Labelled, num_classes: int, l2: float, max_iterations: int) -> Tensor:
    """The weights [D + 1, num_classes], biases last. Communicates: every rank takes the same steps, for the sums over
    ranks that decide them are the same."""
    inputs = with_one(train.vectors.double())
    weights = inputs.new_zeros(inputs.shape[1], num_classes, requires_grad=True)
    count = all_reduce_sum(torch.tensor(float(len(inputs)), dtype=torch.float64, device=inputs.device))
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        logits = inputs @ weights.detach()
        slopes = logits.softmax(dim=1)
        slopes[torch.arange(len(slopes), device=slopes.device), train.classes] -= 1.0
        own = F.cross_entropy(logits, train.classes, reduction="sum").view(1)
        found = all_reduce_sum(torch.cat([own, (inputs.T @ slopes).flatten()])) / count
        penalty = weights.detach().clone()
        penalty[-1] = 0.0
        weights.grad = found[1:].view_as(weights) + l2 * penalty
        return found[0] + 0.5 * l2 * penalty.square().sum()

    solver.step(closure)
    closure()
    assert weights.grad is not None
    steepest = float(weights.grad.abs().max())
    if steepest > GRADIENT_TOLERANCE:
        log.warning("the linear probe stopped after %d steps, with a derivative of %.1e", max_iterations, steepest)
    return weights.detach()
