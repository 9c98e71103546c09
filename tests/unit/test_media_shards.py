"""Shards of recordings and videos through the loader: a broken clip costs one line of the ledger."""

from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from media import counting_frames, recording, video

from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig
from data_pipeline.ledger import Ledger, read_ledger
from data_pipeline.loader import build_loader
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.audio import AudioCodecConfig
from mmpretrain.modalities.video import VideoCodecConfig


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_of_video_and_sound_is_loaded_and_a_broken_clip_replaced(tmp_path: Path, workers: int) -> None:
    clip = video(counting_frames(20))
    with webdataset.TarWriter(str(tmp_path / "clips.tar")) as writer:
        for number in range(4):
            sound = recording(np.full(800, 100 + number, np.int16), 16_000)
            writer.write({"__key__": f"{number}", "mp4": clip[: 700 if number == 2 else None], "wav": sound})
    codecs = {
        "audio": AudioCodecConfig().codec({"audio": FieldSpec((1600,), "int16", 16_000)}, None),
        "video": VideoCodecConfig().codec({"video": FieldSpec((2, 3, 16, 16), "uint8")}, None),
    }
    train = MixtureConfig(sources={"main": SourceConfig(shards=(str(tmp_path),))})
    loader = build_loader(DataConfig(train=train, workers=workers), codecs, BatchPlan(4, 4, World()), 0, 0, 1)
    ((batch,),) = list(loader)
    assert batch.tensors["video"].shape == (4, 2, 3, 16, 16) and batch.tensors["video"].dtype == torch.uint8
    assert batch.tensors["audio"].shape == (4, 1600) and batch.tensors["audio"].dtype == torch.int16
    assert batch.tensors["audio.mask"].sum(dim=1).tolist() == [5] * 4
    assert {skip.key for skip in batch.skips} == {"2"}
    assert all("the video cannot be decoded" in skip.reason for skip in batch.skips)
    assert all(key.rsplit("/", 1)[1] != "2" for key in batch.keys)


def test_of_real_clips_a_broken_one_costs_one_line_and_one_without_sound_track_none(
    tmp_path: Path, shared_data: Path
) -> None:
    silent, sounding = ((shared_data / "clips" / f"{name}.mp4").read_bytes() for name in ("example", "example2"))
    with webdataset.TarWriter(str(tmp_path / "clips.tar")) as writer:
        for key, clip in {"silent": silent, "sounding": sounding, "cut": sounding[: len(sounding) // 2]}.items():
            writer.write({"__key__": key, "mp4": clip})
    codecs = {
        "audio": AudioCodecConfig(missing="weightless").codec({"audio": FieldSpec((1600,), "int16", 16_000)}, None),
        "video": VideoCodecConfig().codec({"video": FieldSpec((2, 3, 16, 16), "uint8")}, None),
    }
    train = MixtureConfig(sources={"main": SourceConfig(shards=(str(tmp_path),))})
    ((batch,),) = list(build_loader(DataConfig(train=train, workers=0), codecs, BatchPlan(3, 3, World()), 0, 0, 1))
    ledger = Ledger(tmp_path / "ledger.jsonl", budget=1.0)
    ledger.add(batch.skips)
    assert {skip.key for skip in read_ledger(tmp_path / "ledger.jsonl")} == {"cut"}
    assert {key.rsplit("/", 1)[1] for key in batch.keys} == {"silent", "sounding"}
    assert batch.tensors["audio.present"].tolist() == [key.endswith("sounding") for key in batch.keys]
    assert batch.tensors["video.present"].all()
    assert not batch.tensors["audio"][~batch.tensors["audio.present"]].any()
