"""Masked image modelling: fixed shares of patches, pixels normalised in their patch, loss on hidden patches only."""

import pytest
import torch
from pydantic import ValidationError
from tiny_model import PATCH_SIZE, build_model, rows_of
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import row_key
from mmpretrain.layers.noise import uniform
from mmpretrain.layers.patch_masking import PatchMasking, Split
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ModelFacts, TowerFacts
from mmpretrain.objectives.mae import MAEConfig, MaskedAutoencoding, normalise_patches

CONFIG = MAEConfig(decoder_width=32, decoder_depth=1, decoder_heads=4)
PIXELS = 3 * PATCH_SIZE**2


def split_patches(draw: Tensor, stream: str) -> Split:
    return PatchMasking("random", (4, 4), 0.75, stream)(draw)


def objective_of(model: MultimodalTransformer) -> MaskedAutoencoding:
    found = model.objectives["mim"]
    assert isinstance(found, MaskedAutoencoding)
    return found


def encode(model: MultimodalTransformer, rows: dict[str, Tensor]) -> Tensor:
    return objective_of(model).encode(model.encoder(rows))["sum"]


def paint(images: Tensor, row: int, patch: int, pixels: Tensor) -> Tensor:
    """A copy with one patch of the 4 x 4 grid replaced."""
    painted, (top, left) = images.clone(), divmod(patch, 4)
    rows, columns = (slice(start * PATCH_SIZE, (start + 1) * PATCH_SIZE) for start in (top, left))
    painted[row, :, rows, columns] = pixels
    return painted


def test_patches_are_split_into_fixed_shares_that_follow_from_the_row_key() -> None:
    draw = torch.tensor([row_key(0, position) for position in range(500)])
    split = split_patches(draw, "test")
    both = torch.cat([split.visible, split.hidden], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(16).expand(500, 16))
    assert torch.equal(split.visible, split.visible.sort(dim=1).values)
    assert torch.equal(split_patches(draw[7:8], "test").visible[0], split.visible[7])
    often = torch.bincount(split.visible.flatten(), minlength=16) / 500
    torch.testing.assert_close(often, torch.full((16,), 0.25), atol=0.08, rtol=0)


def test_predicting_zero_costs_one_for_each_hidden_patch() -> None:
    model, rows = build_model({"mim": CONFIG}), rows_of([1] * 6)
    with torch.no_grad():
        objective_of(model).decoder.predict.weight.zero_()
        objective_of(model).decoder.predict.bias.zero_()
    count = objective_of(model).count(rows).item()
    assert count == 6 * 12
    assert encode(model, rows).item() / count == pytest.approx(1 - 1 / PIXELS, abs=1e-4)


def test_masks_and_loss_equal_those_of_vit_mae_in_transformers() -> None:
    """Given the same noise and the same predictions."""
    narrow = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = ViTMAEConfig(
        image_size=16,
        patch_size=PATCH_SIZE,
        mask_ratio=0.75,
        norm_pix_loss=True,
        **narrow,
        **{f"decoder_{name}": value for name, value in narrow.items()},
    )
    theirs = ViTMAEForPreTraining(config)
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    draw = torch.tensor([row_key(0, position) for position in range(2)])
    expected = theirs(images, noise=uniform(draw, 16, "test"))
    hidden = split_patches(draw, "test").hidden
    assert torch.equal(torch.zeros(2, 16).scatter(1, hidden, 1.0), expected.mask)
    errors = (expected.logits - normalise_patches(theirs.patchify(images))).square().mean(-1)
    torch.testing.assert_close(errors.gather(1, hidden).sum() / 24, expected.loss)


def test_loss_does_not_depend_on_the_targets_of_visible_patches() -> None:
    """With a decoder that ignores its input, only hidden pixels matter."""
    model, rows = build_model({"mim": CONFIG}), rows_of([1, 1])
    with torch.no_grad():
        objective_of(model).decoder.predict.weight.zero_()
    before = encode(model, rows)
    split = split_patches(rows["draw"], "mae.image")
    noise = torch.randint(0, 256, (3, PATCH_SIZE, PATCH_SIZE), dtype=torch.uint8)
    visible = paint(rows["image"], 0, int(split.visible[0, 0]), noise)
    hidden = paint(rows["image"], 0, int(split.hidden[0, 0]), noise)
    torch.testing.assert_close(encode(model, rows | {"image": visible}), before)
    objective_of(model).decoder.predict.bias.data += torch.linspace(-1, 1, PIXELS)
    assert abs(encode(model, rows | {"image": hidden}) - encode(model, rows)).item() > 1e-3


def test_the_prediction_sees_visible_patches_and_no_hidden_one() -> None:
    model, rows = build_model({"mim": CONFIG}), rows_of([1, 1])
    split = split_patches(rows["draw"], "mae.image")
    predictions: list[Tensor] = []
    objective_of(model).decoder.register_forward_hook(lambda module, inputs, output: predictions.append(output))
    black = torch.zeros(3, PATCH_SIZE, PATCH_SIZE, dtype=torch.uint8)
    for images in (
        rows["image"],
        paint(rows["image"], 0, int(split.hidden[0, 0]), black),
        paint(rows["image"], 0, int(split.visible[0, 0]), black),
    ):
        encode(model, rows | {"image": images})
    original, hidden_changed, visible_changed = predictions
    assert original.shape == (2, 12, PIXELS)
    assert torch.equal(hidden_changed, original)
    assert not torch.allclose(visible_changed[0], original[0])
    assert torch.equal(visible_changed[1], original[1])


def test_each_hidden_patch_is_predicted_from_its_own_position() -> None:
    """Without tokens to tell them apart, hidden patches differ by position alone: the same patch, the same pixels."""
    decoder = objective_of(build_model({"mim": CONFIG})).decoder
    tokens = torch.zeros(2, 1 + 4, 32)
    visible = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    hidden = torch.arange(4, 16).expand(2, 12)
    predicted = decoder(tokens, visible, hidden)
    torch.testing.assert_close(predicted[0], predicted[1])
    assert (predicted[0, 0] - predicted[0, 1]).abs().max() > 1e-4


def test_absent_images_count_nothing_and_change_nothing() -> None:
    model, rows = build_model({"mim": CONFIG}), rows_of([1, 1, 1])
    rows["image.present"][1] = False
    kept = {name: tensor[[0, 2]] for name, tensor in rows.items()}
    assert objective_of(model).count(rows).item() == 24
    torch.testing.assert_close(encode(model, rows), encode(model, kept))


def test_flat_patches_have_targets_of_zero() -> None:
    assert torch.equal(normalise_patches(torch.full((1, 2, 48), 0.7)).round(decimals=3), torch.zeros(1, 2, 48))


def test_hidden_patches_are_predicted_with_the_text_in_sight_and_without_those_of_others() -> None:
    """Through the fusion a row's own text changes its predictions; a row without its text counts nothing."""
    seen = CONFIG.model_copy(update={"condition_on": ("text",)})
    model, rows = build_model({"mim": seen}), rows_of([5, 9, 3])
    rows["text.present"][1] = False
    predictions: list[Tensor] = []
    objective_of(model).decoder.register_forward_hook(lambda module, inputs, output: predictions.append(output))
    loss = encode(model, rows)
    loss.backward()
    other = rows["text"].clone()
    other[:2, 0] = (other[:2, 0] + 1) % 50 + 5
    encode(model, rows | {"text": other})
    before, after = predictions
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1:], after[1:])
    assert objective_of(model).count(rows).item() == 2 * 12
    assert objective_of(model).conditions == ("text",)
    kept = {name: tensor[[0, 2]] for name, tensor in rows.items()}
    torch.testing.assert_close(loss, encode(model, kept))
    words = model.towers["text"].stem.words.weight.grad
    assert words is not None and words.abs().sum() > 0


def test_what_is_hidden_differs_with_what_is_in_sight() -> None:
    facts = build_model({"mim": CONFIG}).facts.towers["image"]
    alone, seen = (CONFIG.model_copy(update={"condition_on": c}).masking_of(facts) for c in ((), ("text",)))
    draw = torch.arange(50)
    assert not torch.equal(alone(draw).hidden, seen(draw).hidden)


def test_a_hidden_modality_in_sight_of_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match="names a modality twice or 'image' itself"):
        MAEConfig(condition_on=("image",))


def test_a_tower_without_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match="mae hides patches of a grid, but tower 'image' has none"):
        CONFIG.build(ModelFacts(8, {"image": TowerFacts(8, 16, 0)}, None))


def test_a_ratio_that_shows_nothing_is_refused() -> None:
    tower = TowerFacts(8, 4, 0, patch_shape=(3, 4, 4), patch_grid=(2, 2))
    with pytest.raises(ConfigError, match="would show 0 of 4 patches"):
        CONFIG.model_copy(update={"mask_ratio": 0.9}).build(ModelFacts(8, {"image": tower}, None))


def test_heads_that_do_not_divide_the_decoder_are_refused() -> None:
    with pytest.raises(ValidationError, match="decoder_width 32 is not a multiple of decoder_heads 5"):
        MAEConfig(decoder_width=32, decoder_heads=5)
