"""The data loaders that loader.py compares: what each one reads is written from the same tars, and its batches.

Each side is `prepare(tars, folder)`, which writes its own form of the samples where it does not read tars, and
`batches(source, tokenizer, workers)`, which yields image tensors of shape [BATCH, 3, SIZE, SIZE]. open_clip runs its
own pipeline with its own transform. The loaders that leave decoding to their user get the fastest public one:
torchvision's decode_jpeg, RandomResizedCrop of uint8 with its SIMD kernel, and the same fast tokenizer as ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SIZE, CONTEXT, BATCH = 224, 77, 64
CROP_SCALE = (0.9, 1.0)
SHUFFLE = 1000
"""Samples in the shuffle buffer of the loaders that have one."""


@dataclass(frozen=True)
class Side:
    batches: Callable[[Path, Path, int], Iterator[Tensor]]
    prepare: Callable[[Path, Path], None] | None = None
    """None: it reads the tars."""
    peer_packages: bool = True
    """Whether it runs with the packages of benchmarks/requirements.txt before this project's."""


class Transform:
    """A photo and its caption as `image` [3, SIZE, SIZE] uint8 and `text` [CONTEXT] int64."""

    def __init__(self, tokenizer: Path) -> None:
        self.path = tokenizer
        self._ready: tuple[Callable[[Tensor], Tensor], Callable[..., dict[str, Tensor]]] | None = None

    def __call__(self, photo: bytes, caption: str) -> tuple[Tensor, Tensor]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        crop, tokenize = self._ready or self._open()
        pixels = decode_jpeg(torch.frombuffer(bytearray(photo), dtype=torch.uint8), mode=ImageReadMode.RGB)
        tokens = tokenize(caption, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
        return crop(pixels), tokens["input_ids"][0]

    def _open(self) -> tuple[Callable[[Tensor], Tensor], Callable[..., dict[str, Tensor]]]:
        from torchvision.transforms import InterpolationMode, v2
        from transformers import AutoTokenizer

        crop = v2.RandomResizedCrop(SIZE, scale=CROP_SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
        self._ready = crop, AutoTokenizer.from_pretrained(self.path)
        return self._ready


def samples_of(path: Path) -> Iterator[tuple[bytes, str]]:
    """Photo and caption of each sample of one tar, in order."""
    import tarfile

    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name in members:
        if name.endswith(".jpg"):
            yield members[name], members[name.removesuffix("jpg") + "txt"].decode()


def ours(tars: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig
    from data_pipeline.loader import build_loader
    from mmpretrain.core.ranks import BatchPlan, World
    from mmpretrain.core.types import FieldSpec
    from mmpretrain.modalities.image import ImageCodecConfig
    from mmpretrain.modalities.text import TextCodecConfig

    inputs = {"image": FieldSpec((3, SIZE, SIZE), "uint8"), "text": FieldSpec((CONTEXT,), "int64")}
    codecs = {
        "image": ImageCodecConfig(crop_scale=CROP_SCALE).codec(inputs, None),
        "text": TextCodecConfig().codec(inputs, str(tokenizer)),
    }
    config = DataConfig(train=MixtureConfig(sources={"photos": SourceConfig(shards=(str(tars),))}), workers=workers)
    for (batch,) in build_loader(config, codecs, BatchPlan(BATCH, BATCH, World()), 0, 0, 10**6):
        yield batch.tensors["image"]


def ours_normalised(tars: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    """What the device does otherwise, charged to the CPU."""
    import torch

    from mmpretrain.modalities.image import CLIP_MEAN, CLIP_STD

    mean = 255 * torch.tensor(CLIP_MEAN).view(3, 1, 1)
    std = 255 * torch.tensor(CLIP_STD).view(3, 1, 1)
    for pixels in ours(tars, tokenizer, workers):
        yield (pixels - mean).div_(std)


def open_clip_batches(tars: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    import open_clip
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(
        train_data=_brace_range(tars),
        train_num_samples=10**7,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(SIZE, is_train=True, mean=None, std=None)
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=CONTEXT)
    for pixels, _ in get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokens).dataloader:
        yield pixels


def webdataset_batches(tars: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    import webdataset

    transform = Transform(tokenizer)
    samples = webdataset.WebDataset(_brace_range(tars), resampled=True).shuffle(SHUFFLE).to_tuple("jpg", "txt")
    batches = samples.map(lambda sample: transform(sample[0], sample[1].decode())).batched(BATCH)
    for pixels, _ in webdataset.WebLoader(batches, batch_size=None, num_workers=workers):
        yield pixels


def write_energon(tars: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in tars.glob("*.tar"):
        (folder / path.name).hardlink_to(path)
    fields = json.dumps({"image": "jpg", "caption": "txt"})
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample"]
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", *options, "--field-map", fields]
    subprocess.run([*command, str(folder)], check=True, stdout=subprocess.DEVNULL)


def energon_batches(folder: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless
    from megatron.energon.flavors import CaptioningSample

    transform = Transform(tokenizer)

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None

        @stateless
        def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
            sample.image, sample.caption = transform(bytes(sample.image), bytes(sample.caption).decode())
            return sample

    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    for batch in get_loader(dataset):
        yield batch.image


def write_litdata(tars: Path, folder: Path) -> None:
    import litdata

    tars_in_order = sorted(map(str, tars.glob("*.tar")))
    litdata.optimize(_fields_of, tars_in_order, str(folder), chunk_bytes="64MB", num_workers=1)


def _fields_of(tar: str) -> Iterator[dict[str, object]]:
    for photo, caption in samples_of(Path(tar)):
        yield {"photo": photo, "caption": caption}


def litdata_batches(folder: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    import litdata

    transform = Transform(tokenizer)

    class Photos(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: object) -> tuple[Tensor, Tensor]:
            sample = super().__getitem__(index)
            return transform(sample["photo"], sample["caption"])

    dataset = Photos(str(folder), shuffle=True)
    for pixels, _ in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers):
        yield pixels


def write_mosaic(tars: Path, folder: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"photo": "bytes", "caption": "str"}) as writer:
        for tar in sorted(tars.glob("*.tar")):
            for sample in _fields_of(str(tar)):
                writer.write(sample)


def mosaic_batches(folder: Path, tokenizer: Path, workers: int) -> Iterator[Tensor]:
    from streaming import StreamingDataLoader, StreamingDataset

    transform = Transform(tokenizer)

    class Photos(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: object) -> tuple[Tensor, Tensor]:
            sample = super().__getitem__(index)
            return transform(sample["photo"], sample["caption"])

    dataset = Photos(local=str(folder), shuffle=True, batch_size=BATCH)
    for pixels, _ in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers):
        yield pixels


def _brace_range(tars: Path) -> str:
    return f"{tars}/{{00000..{len(list(tars.glob('*.tar'))) - 1:05}}}.tar"


SIDES = {
    "open_clip": Side(open_clip_batches),
    "webdataset": Side(webdataset_batches, peer_packages=False),
    "Energon": Side(energon_batches, write_energon),
    "LitData": Side(litdata_batches, write_litdata),
    "MosaicML streaming": Side(mosaic_batches, write_mosaic),
    "ours": Side(ours, peer_packages=False),
    "ours, normalised": Side(ours_normalised, peer_packages=False),
}
