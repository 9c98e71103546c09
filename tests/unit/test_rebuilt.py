"""Strips of what objectives rebuild: the input is drawn as it is, what was hidden is grey, predictions are the rest."""

import numpy as np
import pytest
import torch
from tiny_model import IMAGE_SIZE, PATCH_SIZE, build_model, rows_of

from mmpretrain.evaluation.rebuilt import views
from mmpretrain.objectives.base import Rebuilt, TowerFacts
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.mae import MAEConfig, normalise_patches

MIM = MAEConfig(mask_ratio=0.5, decoder_width=32, decoder_depth=1, decoder_heads=4)


def shades(picture: np.ndarray) -> np.ndarray:
    """Each channel from its least value as 0 to its largest as 1."""
    low, high = picture.min((1, 2), keepdims=True), picture.max((1, 2), keepdims=True)
    return (picture - low) / (high - low)


def test_a_picture_is_drawn_as_it_is_and_grey_where_it_was_hidden() -> None:
    model, rows = build_model({"mim": MIM}).eval(), rows_of([5, 6])
    with torch.no_grad():
        rebuilt = model.objectives["mim"].rebuild(model.encoder(rows))
    for row in range(2):
        whole, seen, predicted = views(rebuilt, model.facts.towers["image"], row)
        picture = rows["image"][row].numpy().astype(np.float64)
        np.testing.assert_allclose(whole.numpy(), shades(picture), atol=1e-5)
        edge = IMAGE_SIZE // PATCH_SIZE
        hidden = rebuilt.hidden[row].view(edge, 1, edge, 1).expand(-1, PATCH_SIZE, -1, PATCH_SIZE)
        hidden = hidden.reshape(IMAGE_SIZE, IMAGE_SIZE)
        assert hidden.float().mean() == 0.5
        assert (seen[:, hidden] == 0.5).all() and torch.equal(seen[:, ~hidden], whole[:, ~hidden])
        assert torch.equal(predicted[:, ~hidden], whole[:, ~hidden])
        assert not torch.equal(predicted[:, hidden], whole[:, hidden])


def test_predictions_are_shown_with_the_mean_and_spread_of_their_patch() -> None:
    """The loss sees normalised patches: taking them of what is shown gives back what was predicted."""
    model, rows = build_model({"mim": MIM}).eval(), rows_of([5, 6])
    objective = model.objectives["mim"]
    with torch.no_grad():
        rebuilt = objective.rebuild(model.encoder(rows))
        split = objective.masking(rows["draw"])
        predicted = objective.predict(model.encoder(rows), split)
    truth, shown = (part[rebuilt.hidden].view(predicted.shape) for part in (rebuilt.patches, rebuilt.predicted))
    spread, mean = truth.std(-1, keepdim=True), truth.mean(-1, keepdim=True)
    torch.testing.assert_close((shown - mean) / spread, predicted, atol=1e-3, rtol=1e-3)
    error = (normalise_patches(truth) - predicted).square().mean(-1).sum()
    assert error == pytest.approx(objective.encode(model.encoder(rows))["sum"].item(), rel=1e-5)


def test_a_video_shows_its_middle_frame_and_a_spectrogram_its_low_bands_below() -> None:
    frames = torch.rand(6, 3, 8, 8)
    tubes = frames.view(3, 2, 3, 2, 4, 2, 4).permute(0, 3, 5, 2, 1, 4, 6).reshape(1, 12, -1)
    video = TowerFacts(8, 12, 0, patch_shape=(3, 2, 4, 4), patch_grid=(3, 2, 2))
    none = torch.zeros(1, 12, dtype=torch.bool)
    drawn = views(Rebuilt("video", tubes, tubes, none), video, 0)[0]
    np.testing.assert_allclose(drawn.numpy(), shades(frames[3].numpy()), atol=1e-6)
    bands = torch.rand(1, 8, 12)
    patches = bands.view(1, 2, 4, 3, 4).permute(1, 3, 0, 2, 4).reshape(1, 6, 16)
    audio = TowerFacts(8, 6, 0, patch_shape=(1, 4, 4), patch_grid=(2, 3))
    drawn = views(Rebuilt("audio", patches, patches, none[:, :6]), audio, 0)[0]
    np.testing.assert_allclose(drawn.numpy(), shades(bands.numpy())[:, ::-1], atol=1e-6)


def test_an_objective_of_no_patches_rebuilds_nothing() -> None:
    model = build_model({"itc": InfoNCEConfig()})
    assert model.objectives["itc"].rebuild(model.encoder(rows_of([5]))) is None
