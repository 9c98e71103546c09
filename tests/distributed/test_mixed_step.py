"""A step over sources of different modalities equals, loss by loss and weight by weight, rows taken one at a time.

The reference is float64 on one process: every row alone, with the modalities it has and without a trace of those it
lacks; the losses written out from their formulas over the rows that have what they read.
"""

import json
from pathlib import Path

import mixture_cases as cases
import pytest
import torch
from launch import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.ranks import World
from mmpretrain.core.types import TensorDict
from mmpretrain.layers.spectrogram import LogMel
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.mae import normalise_patches

Losses = dict[str, tuple[Tensor, int]]
"""Objective -> sum and number of targets."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    cases.write_shards(folder)
    cases.write_tokenizer(folder)
    run_ranks(2, cases.take_steps, folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[TensorDict]:
    """Each row of the step as a batch of its own."""
    (batches,) = cases.loader(cases.run_config(folder, 0, 1), folder, World())
    return [batch.tensors for batch in batches]


@pytest.fixture(scope="module")
def reference(folder: Path, rows: list[TensorDict]) -> tuple[Losses, TensorDict]:
    """Losses, and the gradient of each parameter."""
    config = cases.run_config(folder, 0, 1)
    model = in_float64(cases.build_model(config))
    losses = contrasts(model, rows) | masked_words(model, rows) | hidden_patches(model, rows) | labels(model, rows)
    total = sum(config.objectives[name].weight * value / count for name, (value, count) in losses.items())
    assert isinstance(total, Tensor)
    total.backward()
    zeros = torch.zeros(())
    return losses, {
        name: (zeros.expand(p.shape) if p.grad is None else p.grad).flatten() for name, p in model.named_parameters()
    }


def in_float64(model: MultimodalTransformer) -> MultimodalTransformer:
    """Inputs are normalised and spectra taken in fp32 as ever; from the first matrix product on all is float64."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, LogMel):
            module.filters = module.filters.float()
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
    return model


def has(row: TensorDict, *names: str) -> bool:
    return all(bool(row[f"{name}.present"]) for name in names)


def tower(model: MultimodalTransformer, row: TensorDict, modality: str) -> TensorDict:
    return model.towers[modality](row[modality], row.get(f"{modality}.mask"))


def embedding(model: MultimodalTransformer, row: TensorDict, modality: str) -> Tensor:
    projected = model.projections[modality](tower(model, row, modality)["pooled"])
    return projected[0] / projected[0].norm()


def fused(model: MultimodalTransformer, outputs: dict[str, TensorDict]) -> TensorDict:
    return model.fusion({m: o["tokens"] for m, o in outputs.items()}, {m: o.get("mask") for m, o in outputs.items()})


def contrasts(model: MultimodalTransformer, rows: list[TensorDict]) -> Losses:
    losses: Losses = {}
    for name, (first, second) in {
        "i2t": ("image", "text"),
        "a2t": ("audio", "text"),
        "v2a": ("video", "audio"),
    }.items():
        objective, pairs = model.objectives[name], [row for row in rows if has(row, first, second)]
        u, v = (torch.stack([embedding(model, row, m) for row in pairs]) for m in (first, second))
        logits, own = objective.logit_scale() * u @ v.T, torch.eye(len(pairs), dtype=torch.float64)
        if name == "a2t":
            loss = F.softplus(-(2 * own - 1) * (logits + objective.logit_bias())).sum()
        else:
            loss = -0.5 * (own * (logits.log_softmax(0) + logits.log_softmax(1))).sum()
        losses[name] = loss, len(pairs)
    return losses


def masked_words(model: MultimodalTransformer, rows: list[TensorDict]) -> Losses:
    losses: Losses = {}
    for name, others in {"mlm": (), "mlm_image": ("image",)}.items():
        objective, total, count = model.objectives[name], torch.zeros(()).double(), 0
        for row in (row for row in rows if has(row, "text", *others)):
            eligible = objective.masking.eligible(row["text"], row["text.mask"])
            masked = objective.masking(row["text"], eligible, row["draw"])
            output = model.towers["text"](masked.ids, row["text.mask"])
            tokens = output["tokens"]
            if others:
                tokens = fused(model, {"text": output} | {m: tower(model, row, m) for m in others})["text"]
            for place, target, weight in zip(*(part[0] for part in masked[1:]), strict=True):
                if weight:
                    hidden = objective.head(tokens[:, place])
                    scores = hidden @ model.towers["text"].stem.words.weight.T + objective.bias.weight
                    total, count = total - scores[0].log_softmax(0)[target], count + 1
        losses[name] = total, count
    return losses


def hidden_patches(model: MultimodalTransformer, rows: list[TensorDict]) -> Losses:
    losses: Losses = {}
    for name, modality in {"mim": "image", "mvm": "video"}.items():
        objective, total, count = model.objectives[name], torch.zeros(()).double(), 0
        for row in (row for row in rows if has(row, modality)):
            split = objective.masking(row["draw"])
            tokens = model.towers[modality](row[modality], None, split.visible)["tokens"]
            predicted = objective.decoder(tokens, split.visible, split.hidden)[0]
            wanted = normalise_patches(model.towers[modality].patches(row[modality])[0, split.hidden[0]].double())
            total, count = total + (predicted - wanted).square().mean(1).sum(), count + len(wanted)
        losses[name] = total, count
    return losses


def labels(model: MultimodalTransformer, rows: list[TensorDict]) -> Losses:
    total, count = torch.zeros(()).double(), 0
    for row in (row for row in rows if has(row, "hue")):
        outputs = {m: tower(model, row, m) for m in ("image", "audio", "video") if has(row, m)}
        if outputs:
            scores = model.objectives["hue"].head(fused(model, outputs)["pooled"])[0]
            total, count = total - scores.log_softmax(0)[row["hue"][0]], count + 1
    return {"hue": (total, count)}


def test_the_rows_lack_what_the_test_is_about(rows: list[TensorDict]) -> None:
    """A rank without pictures, a micro-batch without sound or film, films without a sound track, dropped texts."""
    present = {m: [has(row, m) for row in rows] for m in (*cases.STEMS, "hue")}
    assert not any(present["image"][:8]) and any(present["image"][8:])
    assert not any(present["audio"][12:] + present["video"][12:])
    assert any(v and not a for v, a in zip(present["video"], present["audio"], strict=True))
    assert 0 < sum(present["text"]) < 16 and 0 < sum(present["hue"]) < 16
    assert len({tuple(tensor.shape for tensor in row.values()) for row in rows}) == 1


def test_every_tower_learns_from_the_step(reference: tuple[Losses, TensorDict]) -> None:
    for modality in cases.STEMS:
        assert any(gradient.any() for name, gradient in reference[1].items() if name.startswith(f"towers.{modality}"))


@pytest.mark.parametrize("accumulation", cases.ACCUMULATIONS)
@pytest.mark.parametrize("stage", cases.STAGES)
def test_losses_and_gradients_equal_those_of_rows_taken_alone(
    folder: Path, reference: tuple[Losses, TensorDict], stage: int, accumulation: int
) -> None:
    losses, gradients = reference
    case = f"zero{stage}-accumulation{accumulation}"
    found, state = json.loads((folder / f"{case}.json").read_text()), load_file(folder / f"{case}.safetensors")
    assert {name: int(state[f"count/{name}"]) for name in losses} == {
        name: count for name, (_, count) in losses.items()
    }
    assert all(count for _, count in losses.values())
    for name, value in zip(sorted(losses), found, strict=True):
        assert value / losses[name][1] == pytest.approx(losses[name][0].item() / losses[name][1], abs=2e-6), name
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        measured = state[f"exp_avg/{name}"].double() / (1 - 0.9)
        torch.testing.assert_close(
            measured, gradient, atol=2e-6 * float(largest), rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
