"""Captioning: what a prediction may see, and its loss against NumPy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_model import LENGTH, VOCABULARY, build_model, rows_of

from mmpretrain.core.errors import ConfigError
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.captioning import Captioning, CaptioningConfig
from mmpretrain.objectives.mlm import MLMConfig

CONFIG = CaptioningConfig(depth=2, heads=4)


def build(objective: ObjectiveConfig = CONFIG, causal: bool = True) -> MultimodalTransformer:
    return build_model({"caption": objective}, causal)


def objective_of(model: MultimodalTransformer) -> Captioning:
    found = model.objectives["caption"]
    assert isinstance(found, Captioning)
    return found


def test_a_later_token_changes_no_logit_before_it() -> None:
    model, rows = build(), rows_of([14, 14])
    for place in range(1, LENGTH - 1):
        other = rows | {"text": rows["text"].clone()}
        other["text"][:, place] = 3 + (rows["text"][:, place] - 2) % 50
        before, after = (objective_of(model).logits(model.encoder(each)) for each in (rows, other))
        assert torch.equal(before[:, :place], after[:, :place])
        assert (before[:, place] - after[:, place]).abs().max() > 1e-4


def test_every_logit_sees_the_image() -> None:
    model, rows = build(), rows_of([14, 14])
    other = rows | {"image": 255 - rows["image"]}
    before, after = (objective_of(model).logits(model.encoder(each)) for each in (rows, other))
    assert ((before - after).abs().amax(-1) > 1e-5).all()


def test_the_sum_is_numpys_over_tokens_that_count_in_rows_with_both_modalities() -> None:
    model, rows = build(), rows_of([14, 6, 9, 1])
    rows["image.present"][2] = False
    objective = objective_of(model)
    logits = objective.logits(model.encoder(rows)).detach().double().numpy()
    scores, ids = log_softmax(logits, axis=-1), rows["text"].numpy()
    places = [(0, place) for place in range(13)] + [(1, place) for place in range(5)]
    expected = -sum(scores[row, place, ids[row, place + 1]] for row, place in places)
    parts = objective.encode(model.encoder(rows))
    assert objective.count(rows).item() == parts["count"].item() == len(places)
    assert parts["sum"].item() == pytest.approx(expected, rel=1e-5)
    right = np.mean([scores[row, place].argmax() == ids[row, place + 1] for row, place in places])
    assert objective.metrics(parts)["caption_acc"].item() == pytest.approx(right)


def test_loss_starts_near_the_logarithm_of_the_vocabulary() -> None:
    model, rows = build(), rows_of([14] * 16)
    loss = objective_of(model).encode(model.encoder(rows))["sum"].item() / (16 * 13)
    assert loss == pytest.approx(np.log(VOCABULARY), abs=0.2)


def test_absent_rows_are_weightless_and_their_contents_without_influence() -> None:
    model, rows = build(), rows_of([14, 8])
    rows["text.present"][1] = False
    parts = objective_of(model).encode(model.encoder(rows))
    kept = {name: tensor[:1] for name, tensor in rows.items()}
    torch.testing.assert_close(parts["sum"], objective_of(model).encode(model.encoder(kept))["sum"])


def test_a_text_tower_that_sees_later_words_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sees later words too; set model\.towers\.text\.causal to true"):
        build(causal=False)


def test_masked_language_modelling_on_a_causal_tower_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tower 'text' is causal.*set model\.towers\.text\.causal to false"):
        build(MLMConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, r"captioning.heads 5 does not divide the width 32"),
        ({"pair": ("text", "image")}, "tower 'image' has no vocabulary; end the pair with text"),
    ],
)
def test_parts_that_do_not_fit_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(CaptioningConfig.model_validate(settings))
