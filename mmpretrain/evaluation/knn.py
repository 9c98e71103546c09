"""Classification by the nearest training samples, weighted by similarity (Wu et al. 2018, arXiv 1805.01978; DINO).

Enter: frozen unit vectors with labels. Leave: "knn_<modality>_top1" and its mean over classes, with the share of the
most frequent class as chance. Each of the k nearest votes for its class with weight exp(cosine / temperature).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmpretrain.evaluation.features import Labelled, ProbeTaskConfig
from mmpretrain.evaluation.ranking import Embedded, top_rows


class KNNTaskConfig(ProbeTaskConfig):
    """Nearest-neighbour classification of frozen features."""

    kind: Literal["knn"] = "knn"
    k: int = Field(20, gt=0)
    """Neighbours that vote; all, where there are fewer."""
    temperature: float = Field(0.07, gt=0)
    """Cosines are divided by it: the smaller, the more the nearest count."""

    @property
    def figure(self) -> str:
        return "knn"

    def guesses(self, train: Labelled, test: Tensor, num_classes: int) -> Tensor:
        scores, classes = top_rows(test, Embedded(train.vectors, train.classes), self.k)
        return votes(scores, classes, self.temperature, num_classes).argmax(dim=1)


def votes(scores: Tensor, classes: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Sum the weights of neighbours [n, k] by class, float64 [n, num_classes], each row up to a factor of its own."""
    weights = ((scores - scores.amax(dim=1, keepdim=True)).double() / temperature).exp()
    return weights.new_zeros(len(scores), num_classes).scatter_add_(1, classes, weights)
