"""A small model of all four modalities, published, and media it can read.

Enter: a new folder. Leave: towers of one block, a word tokenizer, a head that tells three classes from image, text and
audio together, another that marks tags of a video; nothing is trained.
"""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmpretrain.modalities.audio import AudioCodecConfig
from mmpretrain.modalities.base import CodecConfig
from mmpretrain.modalities.image import ImageCodecConfig
from mmpretrain.modalities.label import LabelCodecConfig
from mmpretrain.modalities.text import TextCodecConfig
from mmpretrain.modalities.video import VideoCodecConfig
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.supervised import SupervisedConfig
from mmpretrain.publishing.facts import PublishFacts
from mmpretrain.publishing.folder import publish_model, write_layouts
from mmpretrain.publishing.processor import write_codecs

WORDS = ("<pad>", "<unk>", "<mask>", "<bos>", "a", "red", "blue", "green", "square", "circle", "and", "dog", "<eos>")
IMAGE_SIZE, FRAMES, RATE = 16, 4, 16_000
CLASSES = ("cat", "dog", "bird")

_TOWER = {"kind": "native", "width": 32, "depth": 1, "heads": 4}
_STEMS = {
    "image": {"kind": "patches", "image_size": IMAGE_SIZE, "patch_size": 8},
    "text": {"kind": "embeddings", "context_length": 12, "vocab_size": len(WORDS), "eos_id": len(WORDS) - 1},
    "audio": {"kind": "spectrogram", "seconds": 1.0},
    "video": {"kind": "tubes", "frames": FRAMES, "image_size": IMAGE_SIZE, "patch_size": 8},
}
_OBJECTIVES = {
    "animal": SupervisedConfig(inputs=("image", "text", "audio"), outputs=3, label="animal"),
    "tags": SupervisedConfig(inputs=("video",), outputs=2, target="tags", label="tags"),
}
CODECS: dict[str, CodecConfig] = {
    "image": ImageCodecConfig(flip=True),
    "text": TextCodecConfig(),
    "audio": AudioCodecConfig(source="file"),
    "video": VideoCodecConfig(),
    "animal": LabelCodecConfig(field="animal", classes=CLASSES),
    "tags": LabelCodecConfig(field="tags"),
}


def build_network(*modalities: str) -> MultimodalTransformer:
    """Towers of these modalities, all if none is named, with the heads that fit; the same weights at every call."""
    towers = {name: _TOWER | {"stem": _STEMS[name]} for name in modalities or _STEMS}
    heads = {name: each for name, each in _OBJECTIVES.items() if set(each.inputs) <= towers.keys()}
    fusion = {"kind": "joint", "width": 24, "depth": 1, "heads": 4} if "animal" in heads else {"kind": "late"}
    config = ModelConfig.model_validate({"embed_dim": 32, "towers": towers, "fusion": fusion})
    torch.manual_seed(3)
    model = MultimodalTransformer.create(resolve(config, None), heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def publish(folder: Path) -> Path:
    """Publish the model of all modalities under the folder, verified as any other."""
    network, tokenizer = build_network(), write_tokenizer(folder / "tokenizer")
    facts = PublishFacts(name="tiny", license="apache-2.0", steps=1, samples_seen=1, run_config={})
    return publish_model(network, folder / "model", facts, tokenizer, CODECS).folder


def write_unverified(folder: Path, *modalities: str) -> Path:
    """A model of some modalities as it is published, without the seconds that verifying takes."""
    (folder / "model").mkdir()
    write_layouts(build_network(*modalities), folder / "model", write_tokenizer(folder / "tokenizer"))
    write_codecs({name: CODECS[name] for name in modalities}, folder / "model")
    return folder / "model"


def write_tokenizer(folder: Path) -> Path:
    """Words between spaces."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<bos>", 3), ("<eos>", len(WORDS) - 1)]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask", "bos", "eos")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (24, 20)) -> Image.Image:
    """One colour with a gradient, so that crops differ."""
    width, height = size
    image = Image.new("RGB", size, colour)
    image.putdata([(colour[0], colour[1], (column * 7) % 256) for _ in range(height) for column in range(width)])
    return image
