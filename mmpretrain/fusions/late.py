"""Late fusion: the towers meet only where their pooled embeddings are compared, so nothing is built."""

from collections.abc import Mapping
from typing import Literal

from mmpretrain.fusions.base import Fusion, FusionConfig


class LateFusionConfig(FusionConfig):
    """No layers between the towers and the common embedding space."""

    kind: Literal["late"] = "late"

    def build(self, widths: Mapping[str, int]) -> Fusion | None:
        return None
