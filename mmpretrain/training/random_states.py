"""The process's random generators as tensors, so that a checkpoint can hold and restore them."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """States of torch (CPU and current CUDA device), NumPy and Python."""
    _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, _ = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(keys, place).astype(np.int64)),
        "numpy_gauss": torch.tensor([float(has_gauss), cached], dtype=torch.float64),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Put back what `random_states` gave; nothing happens when it is empty."""
    if not states:
        return
    torch.set_rng_state(states["torch"])
    numbers = states["numpy"].numpy()
    gauss = states["numpy_gauss"]
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1]), int(gauss[0]), float(gauss[1])))
    version, *internal = states["python"].tolist()
    random.setstate((version, tuple(internal), None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
