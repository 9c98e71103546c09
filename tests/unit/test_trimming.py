"""Texts without the columns that are padding in a whole micro-batch: the same embeddings, losses and gradients."""

from pathlib import Path

import pytest
import torch
from tiny_model import LENGTH, MODEL, rows_of
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, FNetConfig, FNetModel

from mmpretrain.layers.padding import filled_columns, lengthened
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.captioning import CaptioningConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.itm import ITMConfig
from mmpretrain.objectives.mae import MAEConfig
from mmpretrain.objectives.mlm import MLMConfig

TRIMMED = 8
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
OBJECTIVES: dict[str, dict[str, ObjectiveConfig]] = {
    "both ways": {
        "itc": InfoNCEConfig(),
        "mlm": MLMConfig(probability=0.3, condition_on=("image",)),
        "seen": MAEConfig(condition_on=("text",), decoder_width=32, decoder_depth=1, decoder_heads=4),
        "itm": ITMConfig(scale=4.0),
    },
    "causal": {"itc": InfoNCEConfig(), "caption": CaptioningConfig(depth=1, heads=4)},
}


def model_with(text: dict[str, object], objectives: dict[str, ObjectiveConfig] | None = None) -> MultimodalTransformer:
    torch.manual_seed(7)
    config = ModelConfig.model_validate(MODEL | {"towers": MODEL["towers"] | {"text": text}})
    return MultimodalTransformer.create(resolve(config, None), objectives or {}).double()


def native(**options: object) -> dict[str, object]:
    return MODEL["towers"]["text"] | options


def rows() -> dict[str, Tensor]:
    """Five texts of at most 7 tokens, each with an end but the last, which is absent."""
    found = rows_of([3, 7, 5, 2, 1])
    for row, end in enumerate((2, 6, 4, 1)):
        found["text"][row, end] = 63
    found["text"][4], found["text.mask"][4], found["text.present"][4] = 0, False, False
    return found


@pytest.mark.parametrize(
    ("longest", "at_least", "columns"), [(1, 1, 8), (8, 1, 8), (9, 1, 16), (20, 1, 20), (0, 1, 8), (3, 9, 16)]
)
def test_columns_reach_to_the_longest_text_rounded_up(longest: int, at_least: int, columns: int) -> None:
    mask = torch.arange(20) < torch.tensor([0, longest])[:, None]
    assert filled_columns(mask, at_least) == columns


def test_columns_reach_to_the_last_that_counts_wherever_padding_stands() -> None:
    assert filled_columns(torch.tensor([[0, 0, 1] + 7 * [0] + [1] + 9 * [0]]).bool()) == 16


def test_rows_get_their_length_back() -> None:
    assert lengthened(torch.ones(2, 3, 4), 5).sum(2).tolist() == [[4, 4, 4, 0, 0]] * 2
    assert lengthened(torch.ones(1, 2, dtype=torch.bool), 4).tolist() == [[True, True, False, False]]
    assert lengthened(torch.ones(1, 3), 2).shape == (1, 3)


@pytest.mark.parametrize(
    "tower",
    [
        native(),
        native(causal=True),
        native(pooling="eos", causal=True),
        native(pooling="eos"),
        native(pooling="class"),
        native(pooling="map"),
        {"kind": "stem", "width": 32, "stem": MODEL["towers"]["text"]["stem"]},
    ],
    ids=lambda tower: "-".join(str(tower.get(key)) for key in ("kind", "pooling", "causal")),
)
def test_a_trimmed_text_has_the_embedding_of_the_whole_one(tower: dict[str, object]) -> None:
    model, batch = model_with(tower), rows()
    short = model.trimmed(batch)
    assert short["text"].shape == short["text.mask"].shape == (5, TRIMMED) and batch["text"].shape == (5, LENGTH)
    assert torch.equal(short["text"], batch["text"][:, :TRIMMED]) and short["image"] is batch["image"]
    whole, found = (model.encoder(one).tower("text") for one in (batch, short))
    torch.testing.assert_close(found["pooled"][:4], whole["pooled"][:4], atol=1e-6, rtol=0)
    counts = batch["text.mask"][:4, :TRIMMED]
    content = [output["tokens"][:4, -n:][:, :TRIMMED] for output, n in ((whole, LENGTH), (found, TRIMMED))]
    torch.testing.assert_close(content[1][counts], content[0][counts], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "tower", [native(attend_padding=True), native(pooling="last"), native(pooling="map", causal=True)]
)
def test_towers_for_which_padding_counts_see_it_all(tower: dict[str, object]) -> None:
    batch = rows()
    assert model_with(tower).trimmed(batch)["text"] is batch["text"]


def test_an_end_of_text_that_stands_behind_the_mask_is_not_cut_off() -> None:
    batch = rows_of([3, 7])
    batch["text"][:, 10] = 63
    model = model_with(native(pooling="eos", causal=True))
    assert model.trimmed(batch)["text"].shape[1] == LENGTH


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_losses_and_gradients_of_trimmed_micro_batches_are_those_of_whole_ones(name: str, chunks: int) -> None:
    """With two chunks one is trimmed and the other is not, so that lengths differ within a step."""
    batch = rows_of([3, 7, 5, 2, 14, 4, 9, 1])
    batch["text.present"][1] = batch["image.present"][6] = False
    parts = [dict(zip(batch, cut, strict=True)) for cut in zip(*(v.chunk(chunks) for v in batch.values()), strict=True)]
    found = []
    for trim in (False, True):
        model = model_with(native(causal=name == "causal"), OBJECTIVES[name])
        micro = [model.trimmed(part) for part in parts] if trim else parts
        counts = model.counts(micro)
        output = model(micro, {key: 1 / count for key, count in counts.items()})
        output["loss"].backward()
        figures = counts | {key: value for key, value in output.items() if key != "loss"}
        found.append((output["loss"], figures, {n: p.grad for n, p in model.named_parameters()}))
    lengths = [model.trimmed(part)["text"].shape[1] for part in parts]
    assert lengths == ([LENGTH] if chunks == 1 else [TRIMMED, LENGTH])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    clip = {"max_position_embeddings": 20, "eos_token_id": 63, "pad_token_id": 0, "bos_token_id": 1}
    for name, model in {
        "bert": BertModel(BertConfig(**SIZES)),
        "clip": CLIPTextModel(CLIPTextConfig(**SIZES | clip)),
        "fnet": FNetModel(FNetConfig(**SIZES)),
    }.items():
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("name", "pooling"), [("bert", "class"), ("bert", "pooler"), ("bert", "mean"), ("clip", "pooler")]
)
def test_named_encoders_are_trimmed_where_padding_changes_nothing(encoders: Path, name: str, pooling: str) -> None:
    tower = {"kind": "hf_auto", "name": str(encoders / name), "context_length": LENGTH, "pooling": pooling}
    model, batch = model_with(tower), rows()
    short = model.trimmed(batch)
    assert short["text"].shape[1] == TRIMMED
    whole, found = (model.encoder(one).tower("text")["pooled"][:4] for one in (batch, short))
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)


def test_an_encoder_that_mixes_whole_rows_is_not_trimmed(encoders: Path) -> None:
    tower = {"kind": "hf_auto", "name": str(encoders / "fnet"), "context_length": LENGTH, "pooling": "class"}
    batch = rows()
    assert model_with(tower).trimmed(batch)["text"] is batch["text"]
