"""ONNX graphs answer as PyTorch does, at any number of rows, to inputs just as the codecs make them."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from media import counting_frames, recording, tone, video
from published_model import CLASSES, RATE, picture

from mmpretrain.core.errors import ConfigError
from mmpretrain.inference import Model, load
from mmpretrain.inference.onnx_export import ExportError, export_onnx


@pytest.fixture(scope="module")
def model(tiny_published: Path) -> Model:
    return load(tiny_published, device="cpu")


MEDIA = {
    "image": [picture((250, 0, 0)), picture((0, 0, 200), (40, 60)), picture((3, 200, 90))],
    "text": ["a red square", "dog", "a blue circle and a green square and a red dog and"],
    "audio": [recording(tone(seconds, RATE), RATE) for seconds in (0.2, 1.0, 3.0)],
    "video": [video(counting_frames(count)) for count in (5, 12, 3)],
}


@pytest.fixture(scope="module")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "graphs"
    found = export_onnx(model, out, [*MEDIA, "classify-animal"])
    assert sorted(path.stem for path in out.iterdir()) == sorted([*found, "graphs"])
    assert max(found.values()) < 1e-4
    return out


def answers(path: Path, fields: dict[str, torch.Tensor]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {name.replace(".", "_"): tensor.numpy() for name, tensor in fields.items()}
    assert [each.name for each in session.get_inputs()] == list(given)
    (found,) = session.run(None, given)
    return found


@pytest.mark.parametrize("modality", MEDIA)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_tower_embeds_real_media_as_pytorch_does(model: Model, exported: Path, modality: str, rows: int) -> None:
    media = {modality: MEDIA[modality][:rows]}
    found = answers(exported / f"{modality}.onnx", model.processor(**media))
    expected = model.embed(**media)[modality].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert found.shape == (rows, 32)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_fused_classifier_answers_as_pytorch_does(model: Model, exported: Path, rows: int) -> None:
    media = {modality: MEDIA[modality][:rows] for modality in ("image", "text", "audio")}
    logits = answers(exported / "classify-animal.onnx", model.processor(**media))
    expected = model.predict("animal", **media).values.numpy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-4)


def test_the_folder_tells_what_each_graph_reads(exported: Path) -> None:
    described = json.loads((exported / "graphs.json").read_text())
    assert described["audio"]["inputs"] == {
        "audio": {"dtype": "int16", "shape": ["rows", RATE], "rate": RATE},
        "audio_mask": {"dtype": "bool", "shape": ["rows", 100]},
    }
    assert described["classify-animal"]["columns"] == list(CLASSES)
    assert described["image"]["inputs"]["image"]["dtype"] == "uint8"


def test_a_graph_that_answers_differently_is_refused_and_nothing_is_left(model: Model, tmp_path: Path) -> None:
    calls: list[int] = []

    def drift(_module: object, _inputs: object, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        return outputs | {"pooled": outputs["pooled"] + float(len(calls)) * torch.arange(32)}

    handle = model.network.towers["image"].register_forward_hook(drift)
    try:
        with pytest.raises(ExportError, match="image: onnxruntime differs from PyTorch by .*, more than 0.0001"):
            export_onnx(model, tmp_path / "graphs", ["image"])
    finally:
        handle.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_the_exporter_cannot_follow_is_refused(model: Model, tmp_path: Path) -> None:
    def branch(_module: object, _inputs: object, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return outputs if outputs["pooled"].sum().item() > 0 else outputs | {"pooled": -outputs["pooled"]}

    handle = model.network.towers["image"].register_forward_hook(branch)
    try:
        with pytest.raises(ExportError, match="image cannot be exported: "):
            export_onnx(model, tmp_path / "graphs", ["image"])
    finally:
        handle.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no graph smell; it has audio, image, text, video, classify-animal"):
        export_onnx(model, tmp_path / "graphs", ["smell"])
    with pytest.raises(ConfigError, match="exists; remove it, or write the graphs elsewhere"):
        export_onnx(model, tmp_path)
