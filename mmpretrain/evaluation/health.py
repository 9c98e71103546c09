"""Are the embeddings healthy? Figures that show collapse, a gap between modalities, or too few directions in use.

Enter: unit embeddings of each modality, [n, D], and of the rows that hold both modalities of a pair. Leave: per pair
alignment E|u - v|^2 and modality gap |mean u - mean v|; per modality uniformity log E exp(-2 |u - u'|^2), effective
rank and std; per objective with a temperature its logit scale. Refused: less than 2 rows. Papers: alignment and
uniformity, Wang and Isola, ICML 2020 (arXiv 2005.10242); modality gap, Liang et al., NeurIPS 2022 (arXiv 2203.02053);
effective rank, the exponential of the entropy of the normalised singular values of the centred embeddings, Roy and
Vetterli, EUSIPCO 2007 (RankMe, arXiv 2210.02885, is the same without centring); std, the mean standard deviation of a
coordinate times sqrt(D): 1 on an evenly used sphere, 0 when collapsed, Chen and He (SimSiam, arXiv 2011.10566).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmpretrain.core.errors import DataError
from mmpretrain.evaluation.base import EvaluationContext
from mmpretrain.evaluation.lockstep import first_index, gather_ragged
from mmpretrain.evaluation.pairs import PairsTaskConfig
from mmpretrain.layers.scale import LogitScale


class HealthConfig(PairsTaskConfig):
    """Embedding health of modalities and of their pairs."""

    kind: Literal["health"] = "health"
    max_samples: int | None = 2048
    """Uniformity compares all pairs, in memory: a few thousand rows tell enough."""

    def run(self, context: EvaluationContext) -> dict[str, float]:
        pairs = self.chosen(context.model.facts.towers)
        held = embedded_rows(context, self, tuple(dict.fromkeys(modality for pair in pairs for modality in pair)))
        figures: dict[str, float] = {}
        for pair in pairs:
            u, v = held[pair[0]].beside(held[pair[1]]), held[pair[1]].beside(held[pair[0]])
            if self.pairs != "all" or len(u) > 1:
                figures |= pair_health(u, v, pair)
        for modality, rows in held.items():
            if self.pairs != "all" or len(rows.vectors) > 1:
                figures |= modality_health(rows.vectors, modality)
        return self.named(figures | logit_scales(context.model.objectives))


@dataclass(frozen=True)
class HeldRows:
    """Unit embeddings [n, D] of the rows that hold a modality, in the order of the rows' numbers, int64 [n]."""

    vectors: Tensor
    rows: Tensor

    def beside(self, other: "HeldRows") -> Tensor:
        """The embeddings of rows that hold the other modality too."""
        return self.vectors[torch.isin(self.rows, other.rows)]


def embedded_rows(context: EvaluationContext, task: HealthConfig, modalities: tuple[str, ...]) -> dict[str, HeldRows]:
    """The rows of all ranks that hold each modality. Communicates."""
    empty = torch.zeros(0, context.model.facts.embed_dim, device=context.device)
    vectors: dict[str, list[Tensor]] = {modality: [empty] for modality in modalities}
    places: dict[str, list[Tensor]] = {
        modality: [torch.zeros(0, dtype=torch.int64, device=context.device)] for modality in modalities
    }
    count = 0
    for rows in context.turns(task):
        embedded = {m: context.embed(m, context.stand_in(m) if rows is None else rows.tensors) for m in modalities}
        if rows is not None:
            for modality in modalities:
                present = rows.tensors[f"{modality}.present"].nonzero().flatten().to(context.device)
                vectors[modality].append(embedded[modality][present])
                places[modality].append(present + count)
            count += len(rows.keys)
    first = first_index(count)
    return {
        m: HeldRows(gather_ragged(torch.cat(vectors[m])), gather_ragged(torch.cat(places[m]) + first)) for m in places
    }


def pair_health(u: Tensor, v: Tensor, names: tuple[str, str]) -> dict[str, float]:
    """Alignment and gap of paired unit embeddings [n, D]; n at least 2."""
    _at_least_two(u, " and ".join(names))
    u, v = u.double(), v.double()
    alignment, gap = (u - v).square().sum(dim=1).mean(), (u.mean(0) - v.mean(0)).norm()
    pair = "_".join(names)
    return {f"alignment_{pair}": float(alignment), f"modality_gap_{pair}": float(gap)}


def modality_health(rows: Tensor, name: str) -> dict[str, float]:
    """Uniformity, effective rank and std of unit embeddings [n, D]; n at least 2."""
    _at_least_two(rows, name)
    rows = rows.double()
    figures = {
        "uniformity": uniformity(rows),
        "effective_rank": effective_rank(rows),
        "std": rows.std(dim=0, correction=0).mean() * rows.shape[1] ** 0.5,
    }
    return {f"{figure}_{name}": float(value) for figure, value in figures.items()}


def logit_scales(objectives: nn.ModuleDict) -> dict[str, float]:
    """The factor on cosines of each objective that has one; of several, each under its own name beside the objective's.

    Communicates under ZeRO-3, where each is gathered.
    """
    figures: dict[str, float] = {}
    for name, objective in objectives.items():
        for path, module in objective.named_modules():
            if isinstance(module, LogitScale):
                own = "" if path == "logit_scale" else "_" + path.replace(".", "_")
                with torch.no_grad():
                    figures[f"logit_scale_{name}{own}"] = float(module())
    return figures


def _at_least_two(rows: Tensor, names: str) -> None:
    if len(rows) < 2:
        raise DataError(
            f"embedding health needs at least 2 samples that hold {names}; saw {len(rows)}; check its shards"
        )


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
