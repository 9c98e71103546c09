"""Optical flow against motions that are known, and RAFT against torchvision's own network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_small

from mmpretrain.layers.optical_flow import LucasKanadeConfig
from mmpretrain.models.raft import RaftConfig


def texture(places: np.ndarray) -> np.ndarray:
    """Grey of a smooth pattern at places [..., 2] (across, down), coarse waves stronger than fine ones as in photos."""
    draw = np.random.default_rng(0)
    lengths = 2 * np.pi / (0.03 * (0.8 / 0.03) ** draw.random(60))
    turns, phases = draw.uniform(0, 2 * np.pi, (2, 60))
    waves = 2 * np.pi / lengths * np.stack([np.cos(turns), np.sin(turns)])
    values = (lengths * np.sin(places @ waves + phases)).sum(axis=-1)
    return np.clip(127 + 110 * values / 700, 0, 255).round().astype(np.uint8)


def clip_of(back: np.ndarray, shift: np.ndarray, frames: int = 3, size: int = 96) -> torch.Tensor:
    """uint8 [1, T, 3, S, S] whose frame t shows at x what stood at `back` (x - centre) + centre - shift before."""
    down, across = np.mgrid[:size, :size].astype(float)
    places, shown = np.stack([across, down], axis=-1) - size / 2, []
    for _ in range(frames):
        shown.append(texture(places))
        places = places @ back.T - shift
    return torch.from_numpy(np.repeat(np.stack(shown)[None, :, None], 3, axis=2))


@pytest.mark.parametrize("shift", [(0.5, -0.25), (2.0, 1.0), (-3.0, 4.5), (0.0, 0.0)])
def test_a_known_translation_is_found(shift: tuple[float, float]) -> None:
    flow = LucasKanadeConfig().build()(clip_of(np.eye(2), np.array(shift)))
    assert flow.shape == (1, 2, 2, 96, 96)
    errors = (flow - torch.tensor(shift)[:, None, None]).norm(dim=2)[..., 16:-16, 16:-16]
    assert errors.mean() < 0.1 and errors.median() < 0.03, "pixels"


def test_a_known_rotation_is_found() -> None:
    angle = 0.02
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    flow = LucasKanadeConfig().build()(clip_of(back, np.zeros(2), frames=2))[0, 0]
    down, across = np.mgrid[:96, :96] - 48.0
    expected = np.stack([across, down], -1) @ (np.linalg.inv(back).T - np.eye(2))
    errors = np.linalg.norm(flow.numpy().transpose(1, 2, 0) - expected, axis=-1)[16:-16, 16:-16]
    assert errors.mean() < 0.05 < np.linalg.norm(expected, axis=-1).max()


def test_flow_is_each_rows_own_and_fp32_without_gradient() -> None:
    flow = LucasKanadeConfig().build()
    clips = torch.cat([clip_of(np.eye(2), np.array(shift)) for shift in ((1.0, 0.0), (0.0, 2.0))])
    both = flow(clips)
    torch.testing.assert_close(both[1:], flow(clips[1:]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow(clips), both)
    assert both.dtype == torch.float32 and not both.requires_grad
    assert not flow(torch.zeros(1, 2, 3, 32, 40, dtype=torch.uint8)).any()


def test_raft_is_that_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = raft_small().eval()
    torch.save(theirs.state_dict(), tmp_path / "raft.pth")
    ours = RaftConfig(weights=str(tmp_path / "raft.pth"), updates=2).build().train()
    ours.load_pretrained()
    clips = clip_of(np.eye(2), np.array([2.0, 1.0]), size=128)
    frames = clips[0].float() / 127.5 - 1
    expected = theirs(frames[:-1], frames[1:], num_flow_updates=2)[-1]
    torch.testing.assert_close(ours(clips)[0], expected, atol=1e-4, rtol=1e-4)
    assert not list(ours.parameters()) and ours.state_dict().keys() == {f"network.{n}" for n in theirs.state_dict()}
