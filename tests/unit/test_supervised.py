"""Supervised learning and its labels: the loss of rows that have one, against NumPy, and what a codec reads."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax
from tiny_model import MODEL, build_model, rows_of

from mmpretrain.core.errors import ConfigError, SampleError
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.label import LabelCodecConfig
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.supervised import Supervised, SupervisedConfig

CLASSES = torch.tensor([2, 0, 1, 2])
TAGS = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
VALUES = torch.tensor([[0.5, -1, 2], [0, 0, 0], [3, 1, -2], [1, 1, 1]])
TARGETS = pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"target": "class"}, CLASSES),
        ({"target": "class", "smoothing": 0.1}, CLASSES),
        ({"target": "tags"}, TAGS),
        ({"target": "values"}, VALUES),
    ],
)


def case(labels: torch.Tensor, **settings: object) -> tuple[MultimodalTransformer, Supervised, dict[str, torch.Tensor]]:
    """Four rows, the third without a label."""
    config = SupervisedConfig.model_validate({"outputs": 3, **settings})
    model = build_model({"sup": config})
    objective = model.objectives["sup"]
    assert isinstance(objective, Supervised)
    torch.nn.init.normal_(objective.head.predict.weight, generator=torch.Generator().manual_seed(1))
    rows = rows_of([5, 9, 14, 3]) | {"label": labels, "label.present": torch.tensor([True, True, False, True])}
    return model, objective, rows


def expected_losses(outputs: np.ndarray, labels: np.ndarray, target: str, smoothing: float) -> np.ndarray:
    if target == "class":
        wanted = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
        return -(wanted * log_softmax(outputs, axis=1)).sum(1)
    if target == "tags":
        return np.logaddexp(0, np.where(labels, -outputs, outputs)).mean(1)
    return ((outputs - labels) ** 2).mean(1)


@TARGETS
@pytest.mark.parametrize("inputs", [("image",), ("image", "text")])
def test_the_sum_is_that_of_numpy_over_labelled_rows(settings, labels, inputs) -> None:
    model, objective, rows = case(labels, inputs=inputs, **settings)
    encoder = model.encoder(rows)
    outputs = objective.predict(encoder).detach().double().numpy()
    losses = expected_losses(outputs, labels.numpy(), objective.target, objective.smoothing)
    assert objective.count(rows).item() == 3
    assert objective.encode(encoder)["sum"].item() == pytest.approx(losses[[0, 1, 3]].sum(), rel=1e-5)


@TARGETS
def test_the_label_of_a_weightless_row_changes_nothing(settings, labels) -> None:
    model, objective, rows = case(labels, **settings)
    before = objective.encode(model.encoder(rows))
    rows["label"] = labels.clone()
    rows["label"][2] = 0
    after = objective.encode(model.encoder(rows))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_without_any_input_modality_weigh_nothing_and_one_of_several_is_enough() -> None:
    model, objective, rows = case(CLASSES, inputs=("image", "text"))
    rows["image.present"] = torch.tensor([False, False, True, True])
    rows["text.present"] = torch.tensor([False, True, True, True])
    assert objective.count(rows).item() == 2
    kept = {name: tensor[[1, 3]] for name, tensor in rows.items()}
    torch.testing.assert_close(
        objective.encode(model.encoder(rows))["sum"], objective.encode(model.encoder(kept))["sum"]
    )


def test_a_batch_without_labels_has_loss_and_gradient_zero() -> None:
    model, objective, rows = case(CLASSES)
    rows["label.present"][:] = False
    parts = objective.encode(model.encoder(rows))
    parts["sum"].sum().backward()
    assert parts["sum"].item() == objective.count(rows).item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_figures_are_shares_of_right_answers_or_mean_errors() -> None:
    model, objective, rows = case(CLASSES)
    outputs = objective.predict(model.encoder(rows))
    right = (outputs.argmax(1) == CLASSES)[[0, 1, 3]].float().mean().item()
    assert objective.metrics(objective.encode(model.encoder(rows)))["label_acc"].item() == pytest.approx(right)
    model, objective, rows = case(VALUES, target="values")
    error = (objective.predict(model.encoder(rows)) - VALUES).abs().mean(1)[[0, 1, 3]].mean().item()
    assert objective.metrics(objective.encode(model.encoder(rows)))["label_mae"].item() == pytest.approx(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outputs": 1}, "set outputs to 2 or more"),
        ({"outputs": 3, "target": "values", "smoothing": 0.1}, "smoothing 0.1 is for target class, this is values"),
        ({"outputs": 3, "inputs": ("text", "text")}, "names a modality twice"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        SupervisedConfig.model_validate(settings)


def test_a_fused_label_without_a_pooling_fusion_is_refused() -> None:
    model = ModelConfig.model_validate(MODEL | {"fusion": {"kind": "late"}})
    with pytest.raises(
        ConfigError, match=r"objective sup reads the fused pooled vector, .* set model\.fusion\.pooled to"
    ):
        MultimodalTransformer.create(model, {"sup": SupervisedConfig(outputs=3, inputs=("image", "text"))})


CLASS = FieldSpec((), "int64", below=3)


def decode(members: dict[str, bytes], spec: FieldSpec = CLASS, **settings: object) -> tuple[object, bool]:
    codec = LabelCodecConfig.model_validate(settings).codec({"label": spec}, None)
    found = codec.decode(members, None)
    assert {
        name: FieldSpec(array.shape, array.dtype.name, below=codec.fields[name].below) for name, array in found.items()
    } == (dict(codec.fields))
    return found["label"].tolist(), found["label.present"].item()


def member(label: object, key: str = "label") -> dict[str, bytes]:
    return {"json": json.dumps({key: label}).encode()}


def test_a_label_is_read_from_json_or_cls() -> None:
    names = {"classes": ("a", "b", "c")}
    assert decode(member(2)) == (2, True)
    assert decode(member("c", "answer"), key="answer", **names) == (2, True)
    assert decode({"cls": b"1\n"}) == (1, True)
    assert decode({"cls": b"b", "json": b"{}"}, **names) == (1, True)
    assert decode(member(["c", "a"]), FieldSpec((3,), "bool"), **names) == ([True, False, True], True)
    assert decode(member([]), FieldSpec((3,), "bool")) == ([False] * 3, True)
    assert decode(member(0.5), FieldSpec((1,), "float32")) == ([0.5], True)


def test_a_sample_without_a_label_is_refused_unless_it_may_be_weightless() -> None:
    assert decode({"jpg": b""}, missing="weightless") == (0, False)
    assert decode(member(None), FieldSpec((2,), "float32"), missing="weightless") == ([0, 0], False)
    with pytest.raises(SampleError, match=r"neither key 'label' in .json nor a .cls member \(saw: jpg\)"):
        decode({"jpg": b""})


@pytest.mark.parametrize(
    ("label", "spec", "settings", "message"),
    [
        (3, CLASS, {}, "label 3 is none of the 3 classes"),
        (-1, CLASS, {}, "label -1 is not a class number"),
        (True, CLASS, {}, "label True is not a class number"),
        ("a", CLASS, {}, "name the codec's classes"),
        ("z", CLASS, {"classes": ("a", "b", "c")}, "label 'z' is none of a, b, c"),
        ([0, 3], FieldSpec((3,), "bool"), {}, "label 3 is none of the 3 classes"),
        ([0.5], FieldSpec((2,), "float32"), {}, r"label \[0.5\] is not 2 numbers"),
        ([1e39], FieldSpec((1,), "float32"), {}, "is not finite"),
    ],
)
def test_a_label_that_is_no_such_thing_is_refused(label, spec, settings, message) -> None:
    with pytest.raises(SampleError, match=message):
        decode(member(label), spec, **settings)


def test_metadata_that_is_not_json_is_refused() -> None:
    with pytest.raises(SampleError, match="the label cannot be read"):
        decode({"json": b"{"})


def test_as_many_names_as_outputs_are_expected() -> None:
    with pytest.raises(ConfigError, match="names 2 classes and its objective has 3 outputs"):
        decode(member("a"), classes=("a", "b"))
