"""What shards hold, told from their indexes before anything is decoded, and what of it is refused."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline.config import DataConfig, MixtureConfig, SourceConfig
from data_pipeline.holdings import holdings_of, in_words
from data_pipeline.index import build_index
from data_pipeline.loader import Loader, build_loader
from data_pipeline.reader import open_sources
from mmpretrain.config import RunConfig
from mmpretrain.core.errors import DataError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.core.types import Array, FieldSpec
from mmpretrain.training.sources import check_sources

CAPTION = json.dumps({"captions": ["a cat"]})
SOURCES: dict[str, list[dict[str, object]]] = {
    "pictures": [{"jpg": b"-", "json": CAPTION}] * 3,
    "sounds": [{"wav": b"-", "txt": "a bark"}, {"wav": b"-"}],
    "films": [{"mp4": b"-", "wav": b"-", "json": CAPTION}, {"mp4": b"-", "json": "{}"}],
}
READS = {
    "image": frozenset({"jpg"}),
    "audio": frozenset({"wav"}),
    "video": frozenset({"mp4"}),
    "text": frozenset({"txt", "json"}),
    "label": frozenset({"cls"}),
}


@dataclass(frozen=True)
class Sizes:
    """Tells how many bytes the sample's members of a modality have."""

    modality: str
    required: bool = False

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {self.modality: FieldSpec((), "int64"), f"{self.modality}.present": FieldSpec((), "bool")}

    @property
    def extensions(self) -> frozenset[str]:
        return READS[self.modality]

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        found = [len(content) for name, content in members.items() if name in self.extensions]
        return {self.modality: np.array(sum(found)), f"{self.modality}.present": np.array(bool(found))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, samples in SOURCES.items():
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for number, members in enumerate(samples):
                writer.write({"__key__": str(number), **members})
    return tmp_path


def codecs(required: str = "", of: str = "image audio video text") -> dict[str, Sizes]:
    return {name: Sizes(name, name in required.split()) for name in of.split()}


def load(
    folder: Path, wanted: Mapping[str, Sizes], names: str = "pictures sounds films", micro: int = 12, **weights: float
) -> Loader:
    sources = {
        name: SourceConfig(shards=(str(folder / f"{name}.tar"),), weight=weights.get(name, 1.0))
        for name in names.split()
    }
    config = DataConfig(train=MixtureConfig(sources=sources), workers=0)
    return build_loader(config, wanted, BatchPlan(24, micro, World()), 0, 0, 2)


def test_a_shard_tells_what_stands_together_in_its_samples(folder: Path) -> None:
    films = holdings_of(build_index(folder / "films.tar"), codecs())
    assert films.together == {frozenset({"video", "audio", "text"}), frozenset({"video"})}
    assert (films.num_samples, films.extensions) == (2, ("json", "mp4", "wav"))
    assert holdings_of(build_index(folder / "films.tar"), {}).together == {frozenset()}
    (all_of_it,) = open_sources({"all": [str(folder)]}, codecs())
    assert all_of_it.together == films.together | {
        frozenset({"image", "text"}),
        frozenset({"audio", "text"}),
        frozenset({"audio"}),
    }


def test_members_are_told_in_words() -> None:
    told = in_words(["png", "json", "jpg", "cls", "txt", "wav", "webm"])
    assert told == "image (.jpg, .png), audio (.wav), video (.webm), text (.txt), captions or labels (.json), .cls"


@pytest.mark.parametrize("required", ["video", ""])
def test_a_modality_that_no_shard_holds_is_refused_and_what_they_hold_is_told(folder: Path, required: str) -> None:
    with pytest.raises(
        DataError,
        match=r"no shard holds video, which data\.codecs\.video reads from \.mp4; the 2 shards hold image \(\.jpg\), "
        r"audio \(\.wav\), text \(\.txt\), captions or labels \(\.json\); add shards that hold video, or remove",
    ):
        load(folder, codecs(required), "pictures sounds")


def test_evaluation_shards_may_lack_what_samples_may_lack(folder: Path) -> None:
    open_sources({"evaluation": [str(folder / "sounds.tar")]}, codecs("text"))
    with pytest.raises(DataError, match="no shard holds image"):
        open_sources({"evaluation": [str(folder / "sounds.tar")]}, codecs("text image"))


def test_a_source_may_lack_a_modality_only_if_the_codec_says_so(folder: Path) -> None:
    load(folder, codecs("text"))
    with pytest.raises(
        DataError,
        match=r"sounds\.tar is a tar without pairs: none of its 2 samples has all of \(image: one of \.jpg\); it holds "
        r"audio \(\.wav\), text \(\.txt\); .* data\.codecs\.<name>\.missing to be weightless",
    ):
        load(folder, codecs("image"))


def test_modalities_that_never_meet_are_a_tar_without_pairs(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "apart.tar")) as writer:
        writer.write({"__key__": "a", "jpg": b""})
        writer.write({"__key__": "b", "txt": "words"})
    with pytest.raises(DataError, match=r"none of its 2 samples has all of \(image: .*; text: .*\); it holds image"):
        open_sources({"main": [str(tmp_path)]}, codecs("image text", of="image text"))


def test_every_step_of_a_mixture_has_the_same_fields_shapes_and_rows_of_each_source(folder: Path) -> None:
    batches = [batch for step in load(folder, codecs()) for batch in step]
    assert len(batches) == 4
    for batch in batches:
        assert {name: tensor.shape for name, tensor in batch.tensors.items()} == dict.fromkeys(
            batches[0].tensors, (12,)
        )
        counts = [sum(key.startswith(name) for key in batch.keys) for name in SOURCES]
        assert counts == [4, 4, 4]
        assert batch.tensors["image.present"].tolist() == [key.startswith("pictures") for key in batch.keys]
        assert batch.tensors["video.present"].tolist() == [key.startswith("films") for key in batch.keys]


def run_config(folder: Path, micro: int = 12, **objectives: dict[str, object]) -> RunConfig:
    """A run whose data part is only looked at for its weights."""
    tower = {"kind": "native", "width": 8, "depth": 1, "heads": 1}
    stems = {
        "image": {"kind": "patches", "image_size": 8, "patch_size": 4},
        "audio": {"kind": "spectrogram", "seconds": 1.0},
        "video": {"kind": "tubes", "frames": 2, "image_size": 8, "patch_size": 4},
        "text": {"kind": "embeddings"},
    }
    return RunConfig.model_validate(
        {
            "output": "unused",
            "steps": 2,
            "global_batch_size": 24,
            "micro_batch_size": micro,
            "model": {"embed_dim": 8, "towers": {m: tower | {"stem": stem} for m, stem in stems.items()}},
            "objectives": objectives,
            "schedule": {"warmup": 0},
            "data": {
                "train": {"sources": {name: {"shards": [str(folder / f"{name}.tar")]} for name in SOURCES}},
                "codecs": {m: {"kind": m, "missing": "weightless"} for m in stems},
            },
        }
    )


ITC: dict[str, object] = {"kind": "infonce", "pair": ["image", "text"]}


def test_an_objective_that_no_sample_serves_is_refused(folder: Path) -> None:
    config = run_config(folder, itc=ITC, i2a={"kind": "infonce", "pair": ["image", "audio"]})
    with pytest.raises(
        DataError,
        match=r"no sample holds what objective i2a reads together \(image \+ audio\); samples hold "
        r"audio \+ text \+ video, or audio \+ text, or image \+ text, or audio, or video; add shards",
    ):
        check_sources(config, load(folder, codecs()))


def test_of_an_entry_of_several_pairs_each_is_served_by_sources_of_its_own(folder: Path) -> None:
    pairs = [["image", "text"], ["audio", "text"], ["video", "text"]]
    check_sources(run_config(folder, itc={"kind": "infonce", "pairs": pairs}), load(folder, codecs()))
    with pytest.raises(DataError, match=r"no sample holds what objective itc_image_audio reads together"):
        check_sources(run_config(folder, itc={"kind": "infonce", "hub": "image"}), load(folder, codecs()))


def test_a_source_that_serves_no_objective_is_refused(folder: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"source sounds teaches nothing: its samples hold audio \+ text, or audio, and no objective counts such "
        r"samples \(itc: image \+ text; mim: video\); remove the source",
    ):
        check_sources(run_config(folder, itc=ITC, mim={"kind": "mae", "modality": "video"}), load(folder, codecs()))


def test_micro_batches_that_hold_sources_unevenly_are_noted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    objectives = {"itc": ITC, "a2t": ITC | {"pair": ["audio", "text"]}}
    with caplog.at_level(logging.INFO):
        check_sources(run_config(folder, **objectives), load(folder, codecs()))
        assert not caplog.records
        check_sources(run_config(folder, 8, **objectives), load(folder, codecs(), micro=8))
    assert "micro_batch_size 8 is no multiple of the mixture's 3 slots" in caplog.text
