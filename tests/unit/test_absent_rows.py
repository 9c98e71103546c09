"""Rows that lack a modality weigh nothing in any objective, whatever stands in their place, and make nothing NaN."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.core.seeding import row_key
from mmpretrain.layers import products
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.encoding import ChunkEncoder
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.base import Tower
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.captioning import CaptioningConfig
from mmpretrain.objectives.data2vec import Data2VecConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.itm import ITMConfig
from mmpretrain.objectives.mae import MAEConfig
from mmpretrain.objectives.mlm import MLMConfig
from mmpretrain.objectives.siglip import SigLIPConfig
from mmpretrain.objectives.supervised import SupervisedConfig

ROWS, LENGTH, SAMPLES = 6, 8, 3200
TOWER = {"kind": "native", "width": 16, "depth": 1, "heads": 2}
STEMS = {
    "image": {"kind": "patches", "image_size": 8, "patch_size": 4},
    "audio": {"kind": "spectrogram", "seconds": 0.2, "features": {"num_mels": 16}, "patch_mels": 8, "patch_frames": 4},
    "text": {"kind": "embeddings", "context_length": LENGTH, "vocab_size": 30, "mask_id": 2, "special_ids": [0, 1, 2]},
}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "i2t": InfoNCEConfig(),
    "a2t": SigLIPConfig(pair=("audio", "text")),
    "mlm": MLMConfig(probability=0.4),
    "mlm_audio": MLMConfig(probability=0.4, condition_on=("audio",)),
    "mim": MAEConfig(**DECODER),
    "mam": MAEConfig(modality="audio", **DECODER),
    "matching": ITMConfig(pair=("audio", "text")),
    "features": Data2VecConfig(modality="audio", masking="random", top_layers=1, **DECODER),
    "hue": SupervisedConfig(inputs=("image", "audio"), label="hue", outputs=3),
    "tone": SupervisedConfig(inputs=("audio",), label="hue", outputs=3),
}
CAPTIONING: dict[str, ObjectiveConfig] = {
    f"{described}_caption": CaptioningConfig(pair=(described, "text"), depth=1, heads=2)
    for described in ("image", "audio")
}
KINDS = {"two ways": (False, OBJECTIVES), "causal": (True, CAPTIONING)}
LACKING = {
    "image": {"i2t", "mim", "image_caption"},
    "audio": {"a2t", "mlm_audio", "mam", "matching", "features", "tone", "audio_caption"},
    "text": {"i2t", "a2t", "mlm", "mlm_audio", "matching", "image_caption", "audio_caption"},
    "hue": {"hue", "tone"},
}
"""What has no targets in a batch without the modality or label."""


def build(kind: str) -> MultimodalTransformer:
    causal, objectives = KINDS[kind]
    towers = {m: TOWER | {"stem": stem, "causal": causal and m == "text"} for m, stem in STEMS.items()}
    fusion = {"kind": "joint", "width": 16, "depth": 1, "heads": 2}
    torch.manual_seed(5)
    model = ModelConfig.model_validate({"embed_dim": 16, "towers": towers, "fusion": fusion})
    return MultimodalTransformer.create(resolve(model, None), objectives)


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    fields = {
        "image": torch.randint(256, (ROWS, 3, 8, 8), generator=draw, dtype=torch.uint8),
        "audio": torch.randint(-9000, 9000, (ROWS, SAMPLES), generator=draw, dtype=torch.int16),
        "audio.mask": torch.arange(20) < torch.tensor([20, 7, 13, 20, 20, 9])[:, None],
        "text": torch.randint(3, 30, (ROWS, LENGTH), generator=draw),
        "text.mask": torch.arange(LENGTH) < torch.tensor([8, 5, 6, 3, 8, 4])[:, None],
        "hue": torch.randint(3, (ROWS,), generator=draw),
        "draw": torch.tensor([row_key(1, position) for position in range(ROWS)]),
        "sample": torch.arange(ROWS),
    }
    return fields | {f"{name}.present": torch.ones(ROWS, dtype=torch.bool) for name in ("hue", *STEMS)}


def without(fields: dict[str, Tensor], name: str, rows: list[int]) -> dict[str, Tensor]:
    """As a codec leaves rows that lack it: zeros."""
    changed = {key: value.clone() for key, value in fields.items()}
    for key, value in changed.items():
        if key.split(".")[0] == name:
            value[rows] = 0
    return changed


def learn(model: MultimodalTransformer, fields: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the model returns, and all gradients, of the mean losses."""
    model.zero_grad()
    scales = {name: 1 / count.clamp(min=1) for name, count in model.counts([fields]).items()}
    outputs = model([fields], scales)
    outputs["loss"].backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 by the CPU's instructions"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_without_a_modality_is_finite_and_counts_nothing(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision != "bf16":
        monkeypatch.setattr(products, "has_bf16_products", lambda: True)
    model = build(kind)
    model.autocast_dtype = None if precision == "fp32" else torch.bfloat16
    for lacking, silent in LACKING.items():
        fields = without(batch(), lacking, list(range(ROWS)))
        assert {name for name, count in model.counts([fields]).items() if not count} == silent & set(KINDS[kind][1])
        outputs, gradients = learn(model, fields)
        assert all(torch.isfinite(value).all() for value in outputs.values()), lacking
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values()), lacking
        assert all(outputs[f"sum.{name}"] == 0 for name in silent & set(KINDS[kind][1]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_rows_that_lack_a_modality_reaches_nothing(kind: str) -> None:
    model, rows = build(kind), [0, 3]
    for lacking in STEMS:
        zeros = without(batch(), lacking, rows)
        noise = batch() | {f"{lacking}.present": zeros[f"{lacking}.present"]}
        outputs, gradients = learn(model, zeros)
        others, other_gradients = learn(model, noise)
        for name, value in outputs.items():
            torch.testing.assert_close(others[name], value, atol=1e-6, rtol=1e-6, msg=f"{lacking}: {name}")
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-6, rtol=1e-5, msg=f"{lacking}: {name}")


def test_an_absent_row_is_no_negative() -> None:
    """The loss over rows of which some lack a text is that over the others alone."""
    model = build("two ways")
    fields = without(batch(), "text", [1, 4])
    kept = torch.tensor([0, 2, 3, 5])
    whole, _ = learn(model, fields)
    with torch.no_grad():
        image = model.embed("image", fields["image"][kept])
        text = model.embed("text", fields["text"][kept], fields["text.mask"][kept])
    logits, own = image @ text.T / 0.07, torch.arange(4)
    expected = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    torch.testing.assert_close(whole["sum.i2t"] / 4, expected, atol=1e-5, rtol=0)


class Dividing(Tower):
    """Divides by the number of tokens that count, as some pretrained encoders do."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> dict[str, Tensor]:
        assert mask is not None
        tokens = F.one_hot(inputs, 30).float()
        pooled = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return {"tokens": tokens, "mask": mask, "pooled": pooled}


def test_a_tower_meets_no_row_in_which_nothing_counts() -> None:
    fields = without(batch(), "text", [1, 4])
    encoder = ChunkEncoder({"text": Dividing()}, {"text": nn.Identity()}, None, fields)
    assert torch.isfinite(encoder.embed("text")).all()
