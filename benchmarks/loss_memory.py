"""Peak memory and CPU time of contrastive losses over the batch size, ours beside open_clip's.

Enter: nothing. Leaves: a table, and a JSON record with the exponent of memory in the batch from 1k to 64k. Exits 1 when
that of ours is above 1.1, or when a loss or gradient differs from open_clip's.

Each point is one forward and backward in a fresh process of one thread, on one process's rows [batch, 512] in fp32;
memory is the growth of the resident set over what stands before the forward, the inputs among it.

    python benchmarks/loss_memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 512
BATCHES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
LARGEST_DENSE = 16384
"""open_clip's losses hold several batch x batch matrices: 4 GiB there, 16 GiB at 32k."""
PEERS = {"infonce": "open_clip ClipLoss", "siglip": "open_clip SigLipLoss"}
MAX_EXPONENT = 1.1
TOLERANCE = 1e-5
MIB = 2**20

Record = dict[str, float | int | str]


def measure(loss: str, batch: int) -> Record:
    """One forward and backward in this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(batch, WIDTH), dim=1) for _ in range(2))
    inputs = (first.requires_grad_(), second.requires_grad_())
    forward = _forwards()[loss]
    forward(*(side.detach()[:8].requires_grad_() for side in inputs)).backward()
    before_bytes, before_s = _resident_bytes(), _cpu_s()
    value = forward(*inputs)
    value.backward()
    cpu_s = _cpu_s() - before_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert first.grad is not None
    return {
        "loss": loss,
        "batch": batch,
        "peak_mib": round((peak_bytes - before_bytes) / MIB, 1),
        "cpu_s": round(cpu_s, 2),
        "value": value.item(),
        "grad_norm": first.grad.norm().item(),
    }


def _forwards() -> dict[str, Callable[..., Tensor]]:
    """Mean losses by name; imports torch, which the process that only starts others does without."""
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    from mmpretrain.objectives.base import ModelFacts, Objective
    from mmpretrain.objectives.infonce import InfoNCEConfig
    from mmpretrain.objectives.siglip import SigLIPConfig

    facts = ModelFacts(WIDTH, {}, None)

    def mean(objective: Objective, first: Tensor, second: Tensor) -> Tensor:
        present = torch.ones(len(first), dtype=torch.bool)
        return objective.reduce({"first": first, "second": second, "present": present}) / len(first)

    infonce, siglip = InfoNCEConfig().build(facts), SigLIPConfig().build(facts)
    scale, bias = torch.tensor(1 / 0.07, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    return {
        "infonce": lambda first, second: mean(infonce, first, second),
        "siglip": lambda first, second: mean(siglip, first, second),
        PEERS["infonce"]: lambda first, second: ClipLoss()(first, second, scale),
        PEERS["siglip"]: lambda first, second: SigLipLoss()(first, second, 10 * scale / scale.detach(), bias),
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_apart(loss: str, batch: int) -> Record:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--point", loss, str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    point: Record = json.loads(done.stdout.splitlines()[-1])
    return point


def exponent(points: list[Record]) -> float:
    """Slope of log memory over log batch, by least squares."""
    batches, peaks = ([float(point[key]) for point in points] for key in ("batch", "peak_mib"))
    return float(np.polyfit(np.log(batches), np.log(peaks), 1)[0])


def disagreements(ours: list[Record], theirs: list[Record]) -> list[str]:
    """Batches where value or gradient norm differ by more than the tolerance."""
    reference = {point["batch"]: point for point in theirs}
    return [
        f"{point['loss']} at {point['batch']}: {key} {point[key]} and {reference[point['batch']][key]}"
        for point in ours
        for key in ("value", "grad_norm")
        if point["batch"] in reference
        and abs(float(point[key]) / float(reference[point["batch"]][key]) - 1) > TOLERANCE
    ]


def compare(loss: str, peer: str) -> tuple[dict[str, object], list[str]]:
    """All points of a loss and its peer: what they add up to, and what is wrong."""
    ours = [_shown(measure_apart(loss, batch)) for batch in BATCHES]
    theirs = [_shown(measure_apart(peer, batch)) for batch in BATCHES if batch <= LARGEST_DENSE]
    last, same = theirs[-1], next(point for point in ours if point["batch"] == LARGEST_DENSE)
    grown = exponent(ours)
    summary: dict[str, object] = {
        "exponent": round(grown, 3),
        "peer": peer,
        "peer_exponent": round(exponent(theirs), 3),
        f"peer_memory_ratio_at_{LARGEST_DENSE}": round(float(last["peak_mib"]) / float(same["peak_mib"]), 1),
        f"peer_time_ratio_at_{LARGEST_DENSE}": round(float(last["cpu_s"]) / float(same["cpu_s"]), 2),
    }
    print(json.dumps(summary, indent=1))
    faults = disagreements(ours, theirs)
    if grown > MAX_EXPONENT:
        faults.append(f"{loss}: memory grows with exponent {grown:.3f}, more than {MAX_EXPONENT}")
    return summary | {"points": ours + theirs}, faults


def run(out: Path) -> int:
    results = {loss: compare(loss, peer) for loss, peer in PEERS.items()}
    _write(out, {loss: summary for loss, (summary, _) in results.items()})
    faults = [fault for _, found in results.values() for fault in found]
    print("\n".join(faults))
    return 1 if faults else 0


def _shown(point: Record) -> Record:
    print(
        f"{point['loss']:>22} {point['batch']:>6} rows  {point['peak_mib']:>8} MiB  {point['cpu_s']:>7} CPU s",
        flush=True,
    )
    return point


def _write(out: Path, summary: dict[str, object]) -> None:
    about = {
        "command": "python benchmarks/loss_memory.py",
        "width": WIDTH,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
        "load": os.getloadavg()[0],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(about | summary, indent=1) + "\n")
    print(f"wrote {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent / "results" / "loss_memory.json"
    parser.add_argument("--out", type=Path, default=default, help="where the JSON record goes")
    parser.add_argument(
        "--point", nargs=2, metavar=("LOSS", "BATCH"), help="measure one point here and print it as JSON"
    )
    arguments = parser.parse_args()
    if arguments.point is None:
        return run(arguments.out)
    loss, batch = arguments.point
    print(json.dumps(measure(loss, int(batch))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
