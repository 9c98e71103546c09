"""Training steps on one GPU, ours beside open_clip's: same architecture, weights, batch and tokens, in bf16.

Enter: nothing, or a checkout of open_clip. Leaves: a table and benchmarks/results/gpu.json. Exits 1 where the first 8
losses differ, where open_clip at its best takes less than 1.15 times as long as ours, or where ours falls short of the
share of the GPU's arithmetic that the case asks for. Refused: a machine without a GPU, unless `--device cpu` is given
to try the script itself.

open_clip runs at its newest head's best flags: fused AdamW, and whole-model compilation. Each measurement is a fresh
process, so that a side has the memory to itself; rounds alternate the sides' order, and what was compiled is kept for
the next. Batches lie in host memory as each side's loader leaves them: ours uint8, open_clip's normalised fp32. MFU
counts the FLOPs of the whole context and no recomputation, over the data sheet's peak. Ten minutes on an H200.

    python benchmarks/gpu.py --open-clip ../open_clip/src
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from step import CASES, COMPARED, TOLERANCE, Case, Step, engine_step, our_step, peer_step

from mmpretrain.core.accelerators import peak_flops
from mmpretrain.training.ranks import leave

RECORD = Path(__file__).parent / "results" / "gpu.json"
FASTER = 1.15
STEPS = 20

_BASE = CASES["vit-b-32"]
_LARGE_IMAGE, _LARGE_TEXT = {"width": 1024, "depth": 24, "heads": 16}, {"width": 768, "depth": 12, "heads": 12}
_TINY = {"width": 64, "depth": 1, "heads": 2}
_LARGE = replace(_BASE, image=_LARGE_IMAGE, text=_LARGE_TEXT, embed_dim=768)
GPU_CASES: dict[str, tuple[Case, float, float]] = {
    "vit-b-16": (replace(_BASE, patch_size=16, batch=512), 123.3e9, 0.45),
    "vit-l-14": (replace(_LARGE, patch_size=14, batch=256), 526e9, 0.52),
    "tiny": (replace(CASES["small"], image=_TINY, text=_TINY, batch=8), 0.2e9, 0.0),
}
"""Case, FLOPs of a sample's forward and backward, and the least MFU; the last is for trying the script."""
SIDES: dict[str, Callable[[Case, torch.device], Step]] = {
    "ours": lambda case, device: our_step(case, "bf16", device=device),
    "ours, compiled": lambda case, device: our_step(case, "bf16", compiled=True, device=device),
    "ours, engine": lambda case, device: engine_step(case, "bf16", device=device),
    "open_clip, fused": lambda case, device: peer_step(case, "bf16", fused=True, device=device),
    "open_clip, fused, compiled": lambda case, device: peer_step(case, "bf16", True, compiled=True, device=device),
}


def measure(name: str, side: str, device: torch.device) -> dict[str, object]:
    """First losses, seconds of a step and peak memory, in this process."""
    case = GPU_CASES[name][0]
    step = SIDES[side](case, device)
    losses = [step().item() for _ in range(COMPARED)]
    seconds = []
    for _ in range(STEPS if device.type == "cuda" else 1):
        _wait(device)
        begun = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    leave()
    return {"losses": losses, "step_s": statistics.median(seconds), "peak_gib": peak}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_apart(name: str, side: str, asked: argparse.Namespace) -> dict[str, object]:
    command = [sys.executable, __file__, "--device", asked.device, "--point", name, side]
    environment = dict(os.environ)
    if asked.open_clip is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(asked.open_clip), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str, asked: argparse.Namespace) -> dict[str, object]:
    """Rounds of all sides in turns, and what is judged of them."""
    points: dict[str, list[dict[str, object]]] = {side: [] for side in SIDES}
    for number in range(asked.rounds):
        for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
            points[side].append(measure_apart(name, side, asked))
            print(f"{name} {side}: {points[side][-1]['step_s']:.4f} s", flush=True)
    case, flops, least = GPU_CASES[name]
    seconds = {side: statistics.median(float(str(one["step_s"])) for one in found) for side, found in points.items()}
    losses: dict[str, list[float]] = {side: found[0]["losses"] for side, found in points.items()}  # type: ignore[misc]
    expected = losses["open_clip, fused"]
    difference = max(abs(a - b) for own in losses.values() for a, b in zip(own, expected, strict=True))
    best_peer = min((side for side in SIDES if side.startswith("open_clip")), key=seconds.__getitem__)
    best = min((side for side in SIDES if side.startswith("ours")), key=seconds.__getitem__)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if asked.device == "cuda" else None
    mfu = {side: None if peak is None else case.batch * flops / each / peak for side, each in seconds.items()}
    ratio = seconds[best_peer] / seconds[best]
    return {
        "case": name,
        "batch": case.batch,
        "samples_per_s": {side: case.batch / each for side, each in seconds.items()},
        "mfu": mfu,
        "points": points,
        "best": best,
        "best_peer": best_peer,
        "ratio": ratio,
        "largest_loss_difference": difference,
        "met": difference <= TOLERANCE["bf16"] and ratio >= FASTER and (mfu[best] or 0.0) >= least,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["vit-b-16", "vit-l-14"], choices=list(GPU_CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--open-clip", type=Path, help="the src folder of a checkout, to use instead of the installed")
    parser.add_argument("--point", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: this machine has no GPU that PyTorch can use; benchmarks/step.py is for CPUs", file=sys.stderr)
        return 4
    if asked.point:
        print(json.dumps(measure(*asked.point, torch.device(asked.device))))
        return 0
    results = [compare(name, asked) for name in asked.cases]
    for result in results:
        print(_line(result), flush=True)
    packages = ("torch", "deepspeed", "open_clip_torch")
    machine = {
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "open_clip": "installed" if asked.open_clip is None else str(asked.open_clip),
        "versions": {package: version(package) for package in packages},
    }
    asked.record.parent.mkdir(parents=True, exist_ok=True)
    asked.record.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0 if all(result["met"] for result in results) else 1


def _line(result: dict) -> str:
    rates = "  ".join(f"{side} {rate:.0f}/s" for side, rate in result["samples_per_s"].items())
    return (
        f"{result['case']} batch {result['batch']}: {rates}; {result['best_peer']} takes {result['ratio']:.2f} times "
        f"as long as {result['best']}; losses differ by {result['largest_loss_difference']:.1e}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
