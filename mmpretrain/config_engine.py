"""What of a run's config the engine and the optimizer read: how weights move, and how memory and bandwidth are spent.

Enter: a part of a run file. Leave: frozen configs. Refused: numbers out of their range, and options of DeepSpeed with
which gradients or weights would be wrong without an error.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from mmpretrain.core.config import Config, Rule
from mmpretrain.layers.recompute import Recompute

_HARMFUL: dict[tuple[str, ...], tuple[JsonValue, str]] = {
    ("prescale_gradients",): (False, "the loss is already scaled by the ranks and the targets of the global batch"),
    ("gradient_predivide_factor",): (
        1.0,
        "the loss is already scaled by the ranks and the targets of the global batch",
    ),
    ("managed_gradient_accumulation",): (True, "without it every micro-batch would move the weights by itself"),
    ("zero_optimization", "round_robin_gradients"): (False, "checkpoints would hold the weights in a wrong order"),
    ("zero_optimization", "compute_grad_norm"): (True, "without the norm a step that is not finite goes unnoticed"),
}
"""Options of DeepSpeed 0.19.8 by path: the value that does no harm, and what any other does. Each was run beside one
process, or is refused by DeepSpeed only once it is too late for a message."""


class OptimizerConfig(Config):
    """How weights move. Decay is decoupled and on matrices alone; biases, norms and scales do not decay."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of transformer blocks move by orthogonalised momentum, of the size that lr gives AdamW's
    updates; all else by AdamW (Jordan et al. 2024; arXiv 2502.16982)."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate, for the whole global batch."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments; 0.95 to 0.98 for the second avoids loss spikes (arXiv 2304.13013)."""
    eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Share of lr by which matrices shrink each step."""
    clip_grad_norm: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0: never clipped."""

    momentum: float | None = Field(None, ge=0, lt=1)
    """Share of itself that Muon's momentum keeps in a step; null: 0.95."""

    def broken_rules(self) -> Iterator[Rule]:
        if self.momentum is not None and self.kind != "muon":
            yield ("momentum",), f"is Muon's and the kind is {self.kind}; set betas, or kind to muon"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield ("betas",), f"saw {list(self.betas)}, expected two numbers from 0 to below 1, e.g. [0.9, 0.98]"


class AverageConfig(Config):
    """A moving average of the weights, kept beside them in fp32 and sharded like the optimizer's state: `eval` and
    `publish` take it with --ema."""

    decay: float = Field(0.9999, gt=0, lt=1)
    """Share of itself that the average keeps in a step; the weights fill the rest."""
    warmup: bool = True
    """Keep less at first, (1 + n) / (10 + n) after step n, so that the first weights are soon forgotten."""

    def decay_at(self, step: int) -> float:
        """The share kept after step `step`, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class EngineConfig(Config):
    """How the engine spends memory and bandwidth; DeepSpeed's own dict is generated from the run config."""

    activation_checkpointing: Recompute = "none"
    """block: keep one activation per block and compute the rest again in backward, a third more work; selective: keep
    products and attention as well and compute norms and nonlinearities again, for next to no work."""
    compile: bool = False
    """Compile each transformer block of ours for the shapes it meets (ZeRO stage 0 to 2); the first steps take minutes.
    Needs a C++ compiler, and triton on a GPU."""
    compile_cache: Path | None = None
    """Folder that keeps what was compiled for later runs; null: what TORCHINDUCTOR_CACHE_DIR says, else a folder in the
    node's temporary one."""
    float8: bool = False
    """Multiply in 8-bit floats in the blocks' linear layers of 1,024 and wider while training (Hopper GPUs and newer,
    precision bf16); weights and their gradients keep their types."""
    trim_text: bool = True
    """Leave out the columns of texts that are padding in a whole micro-batch, but for a multiple of 8; results stay the
    same. Towers for which padding counts (SigLIP's) see it all either way."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: moments and master weights live in CPU memory (ZeRO stage 1 and above)."""
    deepspeed: dict[str, JsonValue] = {}
    """Further keys of DeepSpeed's config, passed through; a key that we generate is refused."""

    def broken_rules(self) -> Iterator[Rule]:
        if self.compile and self.activation_checkpointing == "selective":
            yield (
                ("activation_checkpointing",),
                "selective chooses among operations that a compiled block no longer has, and compiling computes cheap "
                "ones again by itself; use none or block, or set compile to false",
            )
        if self.compile_cache is not None and not self.compile:
            yield ("compile_cache",), "nothing is compiled; set compile to true or remove it"
        for path, (harmless, reason) in _HARMFUL.items():
            value = _at(self.deepspeed, path)
            if value is not None and value != harmless:
                yield ("deepspeed", *path), f"saw {value!r}; {reason}; remove it"


def _at(options: JsonValue, path: tuple[str, ...]) -> JsonValue:
    """What stands at a path of nested options; None: nothing."""
    for key in path:
        options = options.get(key) if isinstance(options, dict) else None
    return options
