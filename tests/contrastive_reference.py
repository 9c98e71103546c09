"""Contrastive losses and their gradients written out in float64 NumPy, from the formulas of the papers.

Enter: unit embeddings [B, D] of the whole global batch, factor, bias, and which rows count. Leave: the mean loss and
its gradients. Nothing of the package is used.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """Mean loss over present pairs, and d loss / d each input."""

    loss: float
    first: Matrix
    second: Matrix
    scale: float
    bias: float = 0.0


def _spread(rows: Matrix, kept: NDArray[np.intp], like: Matrix) -> Matrix:
    full = np.zeros_like(like)
    full[kept] = rows
    return full


def infonce(first: Matrix, second: Matrix, scale: float, present: NDArray[np.bool_]) -> Reference:
    kept = np.flatnonzero(present)
    u, v, n = first[kept], second[kept], len(kept)
    cosines = u @ v.T
    shifted = scale * cosines - (scale * cosines).max()
    by_row = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    by_column = np.exp(shifted) / np.exp(shifted).sum(0, keepdims=True)
    loss = -0.5 * (np.log(np.diag(by_row)) + np.log(np.diag(by_column))).mean()
    d_logits = (0.5 * (by_row + by_column) - np.eye(n)) / n
    return Reference(
        float(loss),
        _spread(scale * d_logits @ v, kept, first),
        _spread(scale * d_logits.T @ u, kept, second),
        float((d_logits * cosines).sum()),
    )


def siglip(first: Matrix, second: Matrix, scale: float, bias: float, present: NDArray[np.bool_]) -> Reference:
    kept = np.flatnonzero(present)
    u, v, n = first[kept], second[kept], len(kept)
    cosines, signs = u @ v.T, 2 * np.eye(n) - 1
    logits = scale * cosines + bias
    d_logits = -signs / (1 + np.exp(signs * logits)) / n
    return Reference(
        float(np.logaddexp(0, -signs * logits).sum() / n),
        _spread(scale * d_logits @ v, kept, first),
        _spread(scale * d_logits.T @ u, kept, second),
        float((d_logits * cosines).sum()),
        float(d_logits.sum()),
    )


def through_tower(inputs: Matrix, weight: Matrix, d_embeddings: Matrix) -> Matrix:
    """Gradient of `weight` where embeddings = normalise(inputs @ weight)."""
    outputs = inputs @ weight
    norms = np.linalg.norm(outputs, axis=1, keepdims=True)
    units = outputs / norms
    d_outputs = (d_embeddings - units * (units * d_embeddings).sum(1, keepdims=True)) / norms
    return inputs.T @ d_outputs


def unit_rows(matrix: Matrix) -> Matrix:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def random_pairs(rows: int, width: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Parts of a contrastive objective: unit rows of both sides, all present; the same at every call."""
    generator = np.random.default_rng(rows)
    first, second = (torch.tensor(unit_rows(generator.normal(size=(rows, width))), dtype=dtype) for _ in range(2))
    return {
        "first": first.requires_grad_(),
        "second": second.requires_grad_(),
        "present": torch.ones(rows, dtype=torch.bool),
    }
