"""Which patches are hidden: as many in each row, by its key alone; tubes through time; blocks of neighbours."""

import pytest
import torch
from torch import Tensor

from mmpretrain.core.seeding import row_key
from mmpretrain.layers.patch_masking import Layout, PatchMasking

DRAW = torch.tensor([row_key(0, position) for position in range(400)])
VIDEO = (4, 6, 6)


def hidden_map(masking: PatchMasking) -> Tensor:
    """bool [B, *grid]: what is hidden."""
    split = masking(DRAW)
    hidden = torch.zeros(len(DRAW), masking.num_patches, dtype=torch.bool).scatter(1, split.hidden, True)
    assert not hidden.gather(1, split.visible).any()
    assert split.visible.shape[1] + split.hidden.shape[1] == masking.num_patches
    assert all(torch.equal(part, part.sort(dim=1).values) for part in split)
    return hidden.unflatten(1, masking.grid)


@pytest.mark.parametrize(
    ("layout", "grid", "share", "visible"),
    [("random", VIDEO, 0.9, 14), ("tube", VIDEO, 0.9, 16), ("block", (14, 14), 0.6, 78), ("block", (8,), 0.5, 4)],
)
def test_each_row_hides_as_many_patches_and_each_patch_as_often(
    layout: Layout, grid: tuple[int, ...], share: float, visible: int
) -> None:
    masking = PatchMasking(layout, grid, share, "test")
    hidden = hidden_map(masking)
    assert masking.num_visible == visible
    assert (hidden.flatten(1).sum(1) == masking.num_patches - visible).all()
    assert torch.equal(masking(DRAW[7:9]).visible, masking(DRAW).visible[7:9])
    if layout != "block":  # blocks lie inside the grid, so that its corners are hidden less often
        often = hidden.float().mean(0)
        torch.testing.assert_close(often, torch.full_like(often, 1 - visible / masking.num_patches), atol=0.08, rtol=0)


@pytest.mark.parametrize("layout", ["tube", "block"])
def test_tubes_and_blocks_hide_one_spatial_mask_across_time(layout: Layout) -> None:
    hidden = hidden_map(PatchMasking(layout, VIDEO, 0.75, "test"))
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert len(hidden[:, 0].flatten(1).unique(dim=0)) > 300


def test_random_patches_differ_over_time() -> None:
    hidden = hidden_map(PatchMasking("random", VIDEO, 0.75, "test"))
    assert (hidden != hidden[:, :1]).flatten(1).any(dim=1).all()


def test_blocks_leave_larger_holes_than_random_patches() -> None:
    """Share of neighbours of a hidden patch that are hidden as well: the ratio for independent ones."""

    def together(layout: Layout) -> float:
        hidden = hidden_map(PatchMasking(layout, (14, 14), 0.6, "test"))
        return float((hidden[:, 1:] & hidden[:, :-1]).sum() / hidden[:, :-1].sum())

    assert together("random") == pytest.approx(0.6, abs=0.02)
    assert together("block") > 0.8
