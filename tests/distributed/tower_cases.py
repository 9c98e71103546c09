"""One rank of the check that every tower trains alike on any ranks and stage; launched by test_tower_training.py.

Enter: a folder with encoders of transformers. Leave, written by rank 0: for each group of towers and ZeRO stage the
losses before and after a step, and its gradient norm.
"""

import json
from pathlib import Path

import torch
from partitioned import engine_options
from torch import Tensor

from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import all_reduce_sum, rank, world_size
from mmpretrain.core.types import Batch, TensorDict
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.training.engine import Engine

ROWS, LR, LENGTH = 4, 1e-3, 14
EPS = 1e-3
"""So large that steps are proportional to gradients, also where those are zero but for rounding."""


def groups(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    """Towers that train together, by modality; all kinds that read something else than words from native stems."""

    def auto(name: str, pooling: str = "mean", **options: object) -> dict[str, object]:
        return {"kind": "hf_auto", "name": str(folder / name), "pooling": pooling} | options

    def network(name: str, frames: int | None = None, size: int = 32) -> dict[str, object]:
        return {"kind": "torchvision", "name": name, "frames": frames, "image_size": size}

    text = auto("clap", "pooler", context_length=LENGTH)
    flow = {"kind": "two_stream", "rgb": auto("videomae"), "flow_frames": 3}
    frames = {"kind": "frames", "image": auto("dino", "class"), "frames": 2, "depth": 1, "heads": 2}
    trained = {"weights": str(folder / "resnet18.pth")}
    return {
        "first": {"image": auto("dino", "class"), "video": flow, "audio": auto("ast", "pooler"), "text": text},
        "second": {"image": network("resnet18") | trained, "audio": auto("clap_fused", "pooler"), "text": text},
        "third": {"video": network("s3d", 16), "text": text},
        "fourth": {"video": network("swin3d_t", 2), "audio": auto("wav2vec2_layer", seconds=0.1), "text": text},
        "fifth": {"video": frames, "audio": auto("hubert", seconds=0.1), "text": text},
        "sixth": {"video": network("r3d_18", 8, 16), "text": text},
        "seventh": {"video": network("r2plus1d_18", 8, 16), "text": text},
    }


def stages(group: str) -> tuple[int, ...]:
    """Whether a tower partitions is a matter of ZeRO-3; one group tells that weights left whole train too."""
    return (2, 3) if group == "first" else (3,)


def run_config(towers: dict[str, dict[str, object]], stage: int) -> RunConfig:
    pairs = {f"{m}_text": {"kind": "infonce", "pair": [m, "text"]} for m in towers if m != "text"}
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": 1,
            "precision": "fp32",
            "zero_stage": stage,
            "global_batch_size": ROWS,
            "micro_batch_size": ROWS // world_size(),
            "engine": engine_options(stage, activation_checkpointing="block" if stage == 3 else "none"),
            "model": {"embed_dim": 16, "towers": towers},
            "objectives": pairs,
            "optimizer": {"lr": LR, "eps": EPS, "clip_grad_norm": 0.0},
            "schedule": {"warmup": 0},
            "data": {
                "train": {"sources": {"main": {"shards": ["unused"]}}},
                "codecs": {m: {"kind": m} for m in towers},
            },
        }
    )


def build_model(config: RunConfig) -> MultimodalTransformer:
    torch.manual_seed(7)
    return MultimodalTransformer.create(resolve(config.model, None), config.objectives)


def rows(model: ModelConfig) -> TensorDict:
    """All rows; some recordings and texts are short, and the last row lacks everything but its text."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for modality, field in resolve(model, None).inputs.items():
        low, high = {"uint8": (0, 256), "int16": (-9000, 9000), "int64": (4, 60)}[field.dtype]
        values = torch.randint(low, high, (ROWS, *field.shape), generator=draw)
        tensors[modality] = values.to(getattr(torch, field.dtype))
        tensors[f"{modality}.present"] = torch.ones(ROWS, dtype=torch.bool)
        if modality != "text":
            tensors[f"{modality}.present"][-1] = False
        if modality in ("text", "audio"):
            length = field.shape[0] if field.rate is None else -(-field.shape[0] // (field.rate // 100))
            ends = torch.tensor([length, length // 2 + 1, length, length])
            tensors[f"{modality}.mask"] = torch.arange(length) < ends[:, None]
    return tensors | {name: torch.arange(ROWS) for name in ("position", "draw", "sample")}


def own_batch(config: RunConfig) -> Batch:
    share = config.micro_batch_size
    own = {name: tensor[rank() * share :][:share] for name, tensor in rows(config.model).items()}
    return Batch(own, tuple(map(str, range(share))))


def train(engine: Engine) -> tuple[dict[str, float], dict[str, float]]:
    """Global mean loss of each objective, and the gradient norm, of one step; the losses after it. Communicates."""
    batch = own_batch(engine.config)
    result = engine.step([batch], LR)
    scales = {name: 1 / count for name, count in result.counts.items()}
    with torch.no_grad():
        outputs = engine.model([batch.tensors], scales)
    before, after = dict(result.losses), {name: outputs[f"sum.{name}"] for name in result.losses}
    means = [
        {name: float(all_reduce_sum(sums[name].clone()) * scales[name]) for name in sorted(sums)}
        for sums in (before, after)
    ]
    return means[0] | {"grad_norm": result.grad_norm}, means[1]


def train_all(folder: Path) -> None:
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    for name, towers in groups(folder).items():
        for stage in stages(name):
            config = run_config(towers, stage)
            engine = Engine(build_model(config), config, torch.device("cpu"))
            found[f"{name}-zero{stage}"] = train(engine)
            engine.deepspeed.destroy()
    if rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
