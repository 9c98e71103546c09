"""Are the embeddings healthy? Figures that show collapse, a gap between modalities, or too few directions in use.

Enter: unit embeddings of paired rows, [n, D] each. Leave: the figures of `pair_health` by name. Formulas:
alignment E|u - v|^2 and uniformity log E exp(-2 |u - u'|^2), Wang and Isola, ICML 2020 (arXiv 2005.10242);
modality gap |mean u - mean v|, Liang et al., NeurIPS 2022 (arXiv 2203.02053); effective rank, the exponential of the
entropy of the normalised singular values of the centred embeddings, Roy and Vetterli, EUSIPCO 2007; std, the mean
standard deviation of a coordinate times sqrt(D): 1 on an evenly used sphere, 0 when collapsed, Chen and He (SimSiam,
arXiv 2011.10566).
"""

from typing import Literal

import torch
from torch import Tensor

from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.base import EvaluationContext, TaskConfig
from mmpretrain.evaluation.lockstep import gather_ragged


class HealthConfig(TaskConfig):
    """Embedding health of a pair of modalities."""

    kind: Literal["health"] = "health"
    pair: tuple[str, str] = ("image", "text")
    """The two modalities whose embeddings are compared, row by row."""
    max_samples: int | None = 2048
    """Uniformity compares all pairs, in memory: a few thousand rows tell enough."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.pair

    def run(self, context: EvaluationContext) -> dict[str, float]:
        u, v = paired_embeddings(context, self)
        return self.named(pair_health(u, v, self.pair))


def paired_embeddings(context: EvaluationContext, task: HealthConfig) -> tuple[Tensor, Tensor]:
    """Embeddings of both modalities of rows that hold both, over all ranks. Communicates."""
    found: dict[str, list[Tensor]] = {modality: [] for modality in task.pair}
    for rows in context.turns(task):
        fields = {m: context.stand_in(m) if rows is None else rows.tensors for m in task.pair}
        vectors = {m: context.embed(m, fields[m]) for m in task.pair}
        if rows is not None:
            both = torch.stack([rows.tensors[f"{m}.present"] for m in task.pair]).all(dim=0)
            for modality in task.pair:
                found[modality].append(vectors[modality][both.to(context.device)])
    empty = torch.zeros(0, context.model.facts.embed_dim, device=context.device)
    u, v = (gather_ragged(torch.cat([empty, *found[m]])) for m in task.pair)
    return u, v


def pair_health(u: Tensor, v: Tensor, names: tuple[str, str]) -> dict[str, float]:
    """All figures of paired unit embeddings [n, D]; n at least 2."""
    if len(u) < 2:
        raise DataError(f"embedding health needs at least 2 samples that hold {names[0]} and {names[1]}; saw {len(u)}")
    u, v = u.double(), v.double()
    figures = {"alignment": (u - v).square().sum(dim=1).mean(), "modality_gap": (u.mean(0) - v.mean(0)).norm()}
    for name, rows in zip(names, (u, v), strict=True):
        figures[f"uniformity_{name}"] = uniformity(rows)
        figures[f"effective_rank_{name}"] = effective_rank(rows)
        figures[f"std_{name}"] = rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5
    return {name: float(value) for name, value in figures.items()}


def uniformity(rows: Tensor) -> Tensor:
    """log of the mean of exp(-2 |u - u'|^2) over distinct pairs; lower is more even."""
    squared = torch.pdist(rows).square()
    return (squared * -2.0).logsumexp(dim=0) - torch.log(torch.tensor(float(len(squared))))


def effective_rank(rows: Tensor) -> Tensor:
    """Between 1 and min(n, D): how many directions the centred embeddings use."""
    values = torch.linalg.svdvals(rows - rows.mean(dim=0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum()
    return entropy.exp()
