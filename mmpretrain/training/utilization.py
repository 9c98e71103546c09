"""How much of the hardware a run uses: model FLOP/s of each rank, and their share of what its device can do at best.

Enter: a run's model and codecs, the device. Leave: figures for each step's rate. A device that is not known has no
share, and neither have processors; a model that cannot be run without storage has no figures, with one warning.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmpretrain.config import RunConfig
from mmpretrain.core.accelerators import TERA, peak_flops
from mmpretrain.core.types import Codec
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.flops import training_flops
from mmpretrain.training.parts import model_on_meta
from mmpretrain.training.ranks import device_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utilization:
    """Of one rank (PaLM, arXiv 2204.02311, appendix B: what is computed twice to save memory does not count)."""

    flops_per_sample: float | None = None
    """Forward and backward; None where they could not be counted."""
    peak: float | None = None
    """FLOP/s of the rank's device; None where it is not known."""

    def metrics(self, samples_per_s: float) -> dict[str, float]:
        """`samples_per_s` is of one rank."""
        if self.flops_per_sample is None:
            return {}
        flops = self.flops_per_sample * samples_per_s
        figures = {"train/tflops_per_gpu": flops / TERA}
        return figures if self.peak is None else {**figures, "train/mfu": 100.0 * flops / self.peak}


def utilization(
    config: RunConfig, model_config: ModelConfig, codecs: Mapping[str, Codec], device: torch.device
) -> Utilization:
    """Count once; does not communicate."""
    fields = {name: spec for codec in codecs.values() for name, spec in codec.fields.items()}
    try:
        with torch.random.fork_rng(devices=[]):  # a run's random streams go on as if nothing had been counted
            flops = training_flops(model_on_meta(config, model_config), fields)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as fault:
        log.warning("the model's FLOPs could not be counted, so MFU is not told: %s", str(fault).partition("\n")[0])
        return Utilization()
    return Utilization(flops, peak_flops(device_name(device), config.precision))
