"""One rank of the evaluation of a small model; started by test_evaluation.py.

Enter: number of ranks, the rows of each rank's batches, a folder. Leaves: each rank's figures and the run folder that
rank 0 wrote. Eleven samples with an image, one to three captions, a sound and a video each, but for one that lacks its
image, one its captions, two the sound and one the video.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tiny_model import EOS, IMAGE_SIZE, LENGTH, MASK, MODEL, PAD, UNKNOWN, VOCABULARY, rows_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from mmpretrain.core.collectives import rank
from mmpretrain.core.types import Codec
from mmpretrain.evaluation.base import EvaluationContext, Rows, TaskConfig
from mmpretrain.evaluation.health import HealthConfig
from mmpretrain.evaluation.knn import KNNTaskConfig
from mmpretrain.evaluation.losses import LossesTaskConfig
from mmpretrain.evaluation.mlm import MLMTaskConfig
from mmpretrain.evaluation.probe import LinearProbeConfig
from mmpretrain.evaluation.retrieval import RetrievalConfig
from mmpretrain.evaluation.zeroshot import ZeroShotConfig
from mmpretrain.modalities.audio import AudioCodec, AudioCodecConfig
from mmpretrain.modalities.base import PresenceCodec
from mmpretrain.modalities.image import ImageCodec, ImageCodecConfig
from mmpretrain.modalities.text import TextCodec
from mmpretrain.modalities.video import VideoCodec, VideoCodecConfig
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.data2vec import Data2VecConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.mae import MAEConfig
from mmpretrain.objectives.mlm import MLMConfig

SAMPLES, WITHOUT_IMAGE, WITHOUT_CAPTION, WITHOUT_SOUND, WITHOUT_VIDEO = 11, 3, 7, (2, 9), 5
SOUND_LENGTH, SOUND_RATE, FRAMES = 960, 16000, 2
CLASSES = ["w5 w6", "w7", "w8 w9 w10"]
_SMALL = {"kind": "native", "width": 16, "depth": 1, "heads": 2}
_SOUNDS = {
    "kind": "spectrogram",
    "seconds": SOUND_LENGTH / SOUND_RATE,
    "features": {"num_mels": 16},
    "patch_mels": 8,
    "patch_frames": 2,
}
_TUBES = {"kind": "tubes", "frames": FRAMES, "image_size": IMAGE_SIZE, "patch_size": 8}
FOUR = MODEL | {"towers": MODEL["towers"] | {"audio": _SMALL | {"stem": _SOUNDS}, "video": _SMALL | {"stem": _TUBES}}}
"""The tiny model with a tower for sound and one for video."""
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "itc": InfoNCEConfig(),
    "mlm": MLMConfig(probability=0.4),
    "mlm_image": MLMConfig(probability=0.4, condition_on=("image",)),
    "mlm_seen": MLMConfig(probability=0.4, condition_on=("image", "audio")),
    "mae": MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2),
    "mae_told": MAEConfig(condition_on=("text",), decoder_width=16, decoder_depth=1, decoder_heads=2),
    "features": Data2VecConfig(
        modality="video", decoder_width=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.5, top_layers=1
    ),
}


def build_model(objectives: Mapping[str, ObjectiveConfig]) -> MultimodalTransformer:
    """The same weights at every call."""
    torch.manual_seed(7)
    return MultimodalTransformer.create(resolve(ModelConfig.model_validate(FOUR), None), objectives)


def text_codec() -> TextCodec:
    """Words w3 to w61 with the special ids of the tiny model."""
    specials = {"<pad>": PAD, "<bos>": 1, "<mask>": MASK, "<unk>": UNKNOWN, "<eos>": EOS}
    vocabulary = {f"w{number}": number for number in range(VOCABULARY) if number not in specials.values()} | specials
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<bos>", 1), ("<eos>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=PAD, pad_token="<pad>")
    return TextCodec(tokenizer, LENGTH, "first")


def captions(sample: int) -> list[str]:
    """One to three captions of different words."""
    count = 0 if sample == WITHOUT_CAPTION else sample % 3 + 1
    return [f"w{3 + 5 * sample} w{4 + (7 * sample + c) % 50} w{10 + c}" for c in range(count)]


def samples(numbers: Sequence[int]) -> Rows:
    """The rows of these samples."""
    texts = text_codec()
    encoded = texts.encode([(captions(number) or [""])[0] for number in numbers])
    tensors: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in encoded.items()}
    tensors["image"] = rows_of([1] * SAMPLES)["image"][list(numbers)]
    tensors["image.present"] = torch.tensor([number != WITHOUT_IMAGE for number in numbers])
    tensors["text.present"] = torch.tensor([number != WITHOUT_CAPTION for number in numbers])
    tensors |= {name: value[list(numbers)] for name, value in sounds_and_videos().items()}
    members = [{"captions": captions(number), "label": CLASSES[number % 3], "half": number // 6} for number in numbers]
    return Rows(
        tensors,
        keys=tuple(f"shard/{number}" for number in numbers),
        members=tuple({"json": json.dumps(member).encode()} for member in members),
    )


def sounds_and_videos() -> dict[str, Tensor]:
    """Rows of all samples: noise of different loudness, some of it short, and frames of different pixels."""
    generator = torch.Generator().manual_seed(1)
    loud = torch.randn(SAMPLES, SOUND_LENGTH, generator=generator) * torch.arange(1, SAMPLES + 1)[:, None] * 500
    blocks = SOUND_LENGTH * 100 // SOUND_RATE
    pixels = torch.randint(0, 256, (SAMPLES, FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator)
    everyone = torch.arange(SAMPLES)
    return {
        "audio": loud.to(torch.int16),
        "audio.mask": torch.arange(blocks) < torch.where(everyone % 2 == 0, blocks, blocks - 2)[:, None],
        "audio.present": ~torch.isin(everyone, torch.tensor(WITHOUT_SOUND)),
        "video": pixels.to(torch.uint8),
        "video.present": everyone != WITHOUT_VIDEO,
    }


def context_of(batches: Sequence[Sequence[int]], run_dir: Path) -> EvaluationContext:
    """A context whose rank holds these batches."""

    def rows(shards: Sequence[str] | None, max_samples: int | None) -> Iterator[Rows]:
        return (samples(batch) for batch in batches)

    codecs: Mapping[str, Codec] = {
        "image": PresenceCodec("image", ImageCodec(IMAGE_SIZE, IMAGE_SIZE, ImageCodecConfig()), True, 0.0),
        "text": PresenceCodec("text", text_codec(), True, 0.0),
        "audio": PresenceCodec("audio", AudioCodec(SOUND_LENGTH, SOUND_RATE, AudioCodecConfig()), True, 0.0),
        "video": PresenceCodec("video", VideoCodec(FRAMES, IMAGE_SIZE, IMAGE_SIZE, VideoCodecConfig()), True, 0.0),
    }
    model = build_model(OBJECTIVES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return EvaluationContext(model, codecs, rows, torch.device("cpu"), run_dir)


def tasks(folder: Path) -> list[TaskConfig]:
    """One of each kind, and retrieval by group."""
    path = folder / f"classes-{rank()}.json"
    path.write_text(json.dumps({"classes": CLASSES, "templates": ["w20 {}", "{} w30"], "label_key": "label"}))
    return [
        RetrievalConfig(text_batch=3, samples=4),
        RetrievalConfig(pairs="all", prefix="every", samples=0),
        RetrievalConfig(group_by="half", prefix="half", samples=0),
        ZeroShotConfig(classes=str(path), text_batch=4),
        ZeroShotConfig(classes=str(path), modality="audio", prefix="sounds"),
        ZeroShotConfig(classes=str(path), modality="video", prefix="videos"),
        MLMTaskConfig(),
        LossesTaskConfig(),
        HealthConfig(pairs="all"),
        LinearProbeConfig(l2=0.05),
        LinearProbeConfig(modality="audio", features="pooled", l2=0.05),
        KNNTaskConfig(k=3),
        KNNTaskConfig(modality="video", k=50, features="pooled"),
    ]


def evaluate(batches_of_rank: Sequence[Sequence[Sequence[int]]], folder: Path) -> None:
    """Evaluate everything and write the figures of this rank."""
    context = context_of(batches_of_rank[rank()], folder / "run")
    figures: dict[str, float] = {}
    for task in tasks(folder):
        figures |= task.run(context)
    (folder / f"figures-{rank()}.json").write_text(json.dumps(figures))
