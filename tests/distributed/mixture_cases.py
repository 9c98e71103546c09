"""One rank of the step over a mixture; test_mixed_step.py runs it on every rank of a group.

Enter: a folder with the shards of three sources, of which none holds all four modalities. Leave, written by rank 0: for
each ZeRO stage and accumulation the losses, and the state of the optimizer after one step, which tells the gradients.
"""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import webdataset
from engine_cases import full_state, leave_results
from media import counting_frames, recording, tone, video
from partitioned import engine_options
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.loader import Loader, build_loader
from mmpretrain.config import RunConfig
from mmpretrain.core.collectives import all_reduce_sum, rank, world_size
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.models.config import resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.training.engine import Engine
from mmpretrain.training.parts import build_codecs

GLOBAL_BATCH, TURN = 16, 10
"""Of two ranks the first meets no picture; the second's last rows are pictures alone."""
STAGES, ACCUMULATIONS = (0, 2, 3), (1, 2)
WORDS = ["<pad>", "<bos>", "<mask>", "<unk>", "<eos>", *(f"w{number}" for number in range(25))]
TOWER = {"kind": "native", "width": 16, "depth": 1, "heads": 2}
STEMS = {
    "image": {"kind": "patches", "image_size": 8, "patch_size": 4},
    "audio": {"kind": "spectrogram", "seconds": 0.2, "features": {"num_mels": 16}, "patch_mels": 8, "patch_frames": 4},
    "video": {"kind": "tubes", "frames": 4, "image_size": 8, "patch_size": 4},
    "text": {"kind": "embeddings", "context_length": 8, "vocab_size": 30, "mask_id": 2, "special_ids": [0, 1, 2, 3, 4]},
}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
OBJECTIVES = {
    "i2t": {"kind": "infonce", "pair": ["image", "text"], "weight": 0.5},
    "a2t": {"kind": "siglip", "pair": ["audio", "text"], "weight": 0.25},
    "v2a": {"kind": "infonce", "pair": ["video", "audio"]},
    "mlm": {"kind": "mlm", "probability": 0.4},
    "mlm_image": {"kind": "mlm", "probability": 0.4, "condition_on": ["image"], "weight": 0.5},
    "mim": {"kind": "mae", "modality": "image", **DECODER},
    "mvm": {"kind": "mae", "modality": "video", "mask_ratio": 0.5, **DECODER, "weight": 0.5},
    "hue": {"kind": "supervised", "inputs": ["image", "audio", "video"], "label": "hue", "outputs": 3},
}


def run_config(folder: Path, stage: int, micro: int) -> RunConfig:
    sources = {
        name: {"shards": [str(folder / f"{name}.tar")], "weight": 1.0} for name in ("films", "pictures", "sounds")
    }
    sources["pictures"]["weight"] = 0.0
    codecs = {m: {"kind": m, "missing": "weightless"} for m in STEMS} | {
        "hue": {"kind": "label", "field": "hue", "missing": "weightless"}
    }
    codecs["text"]["drop"] = 0.2  # type: ignore[assignment]
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": 1,
            "seed": 3,
            "precision": "fp32",
            "zero_stage": stage,
            "engine": engine_options(stage),
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": micro,
            "model": {
                "embed_dim": 16,
                "towers": {m: TOWER | {"stem": stem} for m, stem in STEMS.items()},
                "fusion": {"kind": "joint", "width": 16, "depth": 1, "heads": 2},
            },
            "objectives": OBJECTIVES,
            "optimizer": {"clip_grad_norm": 0.0},
            "schedule": {"warmup": 0},
            "data": {
                "train": {"sources": sources, "changes": [{"from_sample": TURN, "weights": {"pictures": 1.0}}]},
                "codecs": codecs,
                "workers": 0,
            },
        }
    )


def write_shards(folder: Path) -> None:
    """Eight samples each: pictures with captions; sounds with captions; films, with a sound track but for one in four,
    and with captions. Every third sample has a label."""
    draw = np.random.default_rng(0)
    for name in ("pictures", "sounds", "films"):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for number in range(8):
                caption = " ".join(f"w{word}" for word in draw.integers(25, size=2 + number % 5))
                label = {} if number % 3 else {"hue": number % 2}
                metadata = json.dumps({"captions": [caption], "label": label.get("hue")})
                writer.write({"__key__": str(number), "json": metadata, **media(name, number, draw)})


def media(name: str, number: int, draw: np.random.Generator) -> dict[str, bytes]:
    if name == "pictures":
        buffer = BytesIO()
        Image.fromarray(draw.integers(256, size=(12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
        return {"png": buffer.getvalue()}
    sound = tone(0.1 + 0.03 * number, 16_000, hertz=200.0 * (number + 1))
    if name == "sounds":
        return {"wav": recording(sound, 16_000)}
    return {"mp4": video(counting_frames(6 + number), sound=sound if number % 4 else None)}


def write_tokenizer(folder: Path) -> str:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def build_model(config: RunConfig) -> MultimodalTransformer:
    torch.manual_seed(7)
    return MultimodalTransformer.create(resolve(config.model, None), config.objectives)


def loader(config: RunConfig, folder: Path, world: World) -> Loader:
    codecs = build_codecs(config, resolve(config.model, None), str(folder / "tokenizer"))
    plan = BatchPlan(GLOBAL_BATCH, config.micro_batch_size, world)
    return build_loader(config.data, codecs, plan, config.seed, 0, 1)


def step(folder: Path, stage: int, accumulation: int) -> None:
    """One step through the loader and the engine. Communicates."""
    config = run_config(folder, stage, GLOBAL_BATCH // world_size() // accumulation)
    engine = Engine(build_model(config), config, torch.device("cpu"))
    (batches,) = loader(config, folder, World(rank(), world_size()))
    result = engine.step(batches, lr=1e-3)
    names = sorted(result.losses)
    sums = all_reduce_sum(torch.stack([result.losses[name] for name in names]))
    state = full_state(engine)
    state |= {f"count/{name}": result.counts[name].reshape(1) for name in names}
    leave_results(folder, f"zero{stage}-accumulation{accumulation}", sums.tolist(), state)
    engine.deepspeed.destroy()


def take_steps(folder: Path) -> None:
    for stage in STAGES:
        for accumulation in ACCUMULATIONS:
            step(folder, stage, accumulation)
