"""`mmpretrain search`: the rows of an embedded folder that are nearest to a query of any modality.

Enter: a model, embeddings it made, one query. Leave: hits, best first. Refused: embeddings of another model, a modality
that none of them has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.inference.media import Media
from mmpretrain.inference.model import Model
from mmpretrain.inference.store import EmbeddedRow, Embeddings, read_embeddings


@dataclass(frozen=True)
class Hit:
    """One row and its nearness."""

    row: EmbeddedRow
    score: float
    """Cosine of the angle between query and row."""


def open_for(model: Model, path: Path) -> Embeddings:
    """Embeddings that this very model made."""
    found = read_embeddings(path)
    if found.header.model != model.fingerprint:
        raise DataError(
            f"{path} was made by the model {found.header.model} ({found.header.source}), and {model.source} is "
            f"{model.fingerprint}; vectors of different models cannot be compared: embed the input again with this one"
        )
    return found


def search(
    model: Model, embeddings: Embeddings, modality: str, query: Media, top: int = 10, among: Sequence[str] = ()
) -> list[Hit]:
    """The `top` rows nearest to the query; `among` names the modalities of rows that count, none all."""
    if top < 1:
        raise ConfigError(f"--top is {top}; ask for at least 1")
    (vector,) = model.embed(**{modality: [query]})[modality].numpy()
    held = {row.modality for row in embeddings.rows}
    if unknown := sorted(set(among) - held):
        raise DataError(f"no row is of {', '.join(unknown)}; the embeddings hold {', '.join(sorted(held))}")
    rows = np.array([n for n, row in enumerate(embeddings.rows) if not among or row.modality in among])
    scores = embeddings.vectors[rows] @ vector
    best = np.argsort(-scores, kind="stable")[:top]
    return [Hit(embeddings.rows[rows[n]], float(scores[n])) for n in best]
