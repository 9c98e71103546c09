"""Inputs that share a tower: the same weights, one set of parameters, and a codec each."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_model import MODEL, rows_of
from transformers import AutoModel

from mmpretrain.config import load_run_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.supervised import SupervisedConfig
from mmpretrain.publishing.probe import probe_inputs

LENGTHS = [14, 9, 7, 12]
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "itc": InfoNCEConfig(),
    "answer": SupervisedConfig(inputs=("image", "question"), outputs=3),
}


def build(**changes: object) -> MultimodalTransformer:
    torch.manual_seed(3)
    model = ModelConfig.model_validate(MODEL | {"shares": {"question": "text"}} | changes)
    return MultimodalTransformer.create(resolve(model, None), OBJECTIVES)


def batch() -> dict[str, torch.Tensor]:
    rows = rows_of(LENGTHS)
    asked = {f"question{name}": rows[f"text{name}"].flip(0) for name in ("", ".mask", ".present")}
    labels = {"label": torch.tensor([0, 1, 2, 0]), "label.present": torch.ones(4, dtype=torch.bool)}
    return rows | asked | labels


def test_a_shared_tower_reads_both_inputs_alike_and_is_there_once() -> None:
    model, rows = build(), batch()
    assert set(model.towers) == set(model.projections) == {"image", "text"}
    asked = model.embed("question", rows["question"], rows["question.mask"])
    torch.testing.assert_close(asked.flip(0), model.embed("text", rows["text"], rows["text.mask"]))
    assert not any("question" in name for name, _ in model.named_parameters() if not name.startswith("fusion."))


def test_the_gradient_of_a_shared_tower_is_the_sum_over_its_inputs() -> None:
    model, rows = build().double(), batch()
    words = model.towers["text"].stem.words.weight
    gradients = {}
    for taken in ((), ("itc",), ("answer",)):
        model.zero_grad()
        scales = {name: torch.tensor(0.0 if name in taken else 0.25) for name in OBJECTIVES}
        model([rows], scales)["loss"].backward()
        gradients[taken] = words.grad.clone()
    both = gradients[("itc",)] + gradients[("answer",)]
    assert gradients[("itc",)].abs().max() > 0 and gradients[("answer",)].abs().max() > 0
    torch.testing.assert_close(gradients[()], both)


def test_a_model_with_shared_towers_is_saved_and_loaded_again(tmp_path: Path) -> None:
    model, rows = build(), batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    vocabulary = {name: facts.vocab_size for name, facts in model.facts.towers.items()}
    assert {"image", "text", "question"} <= probe_inputs(model.config.parsed_model(), vocabulary).keys()
    torch.testing.assert_close(loaded.embed("question", rows["question"]), model.embed("question", rows["question"]))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"question": "sound"}, "shares.question names sound, which is none of the towers image, text"),
        ({"text": "image"}, "shares.text has a tower of its own; remove one of both"),
    ],
)
def test_a_share_that_cannot_be_is_refused(shares: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(MODEL | {"shares": shares})


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("", "has no codec for question, which shares the tower text; add question: {kind: text, field: question"),
        (", question: {kind: image}", "data.codecs.question: decodes image; set its kind to text"),
        (", question: {kind: text}", "data.codecs.question: fills the field text; only texts and labels can be"),
    ],
)
def test_a_shared_input_needs_a_codec_of_its_own(codec: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "defaults: [model/tiny]\noutput: out\nsteps: 200\nglobal_batch_size: 8\nmicro_batch_size: 8\n"
        "model: {shares: {question: text}}\nobjectives: {mmm: {kind: mlm, condition_on: [image]}}\n"
        "data: {train: {sources: {main: {shards: [shards]}}}, "
        f"codecs: {{image: {{kind: image}}, text: {{kind: text}}{codec}}}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert message in str(caught.value)
