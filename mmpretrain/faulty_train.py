"""`mmpretrain train` that can be broken from outside, for drills: `torchrun -m mmpretrain.faulty_train CONFIG`.

Enter: what `train` takes. Leave: what `train` leaves. The signal HANG makes a rank hang, POISON its next loss NaN; no
other program has these hooks.
"""

import gc
import signal
import sys
import time
from types import FrameType

from launcher.chaos.strike import HANG, POISON
from mmpretrain.cli import main


def hang(number: int, frame: FrameType | None) -> None:
    """The main thread sleeps; the process lives on, as in a deadlock."""
    time.sleep(3600)


def poison(number: int, frame: FrameType | None) -> None:
    """The next batch goes through a tower whose output is not a number; the weights stay as they are."""
    import torch
    from torch.utils._pytree import tree_map_only

    from mmpretrain.models.multimodal import MultimodalTransformer

    model = next(one for one in gc.get_objects() if isinstance(one, MultimodalTransformer))
    first = next(iter(model.towers.values()))

    def spoil(module: torch.nn.Module, inputs: object, output: object) -> object:
        handle.remove()
        return tree_map_only(torch.Tensor, lambda one: one * float("nan"), output)

    handle = first.register_forward_hook(spoil)


if __name__ == "__main__":
    signal.signal(HANG, hang)
    signal.signal(POISON, poison)
    main(["train", *sys.argv[1:]])
