"""Muon for hidden matrices beside AdamW for the rest, against torch.optim.Muon."""

import copy

import pytest
import torch
from tiny_model import build_model
from torch import Tensor, nn

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.config_engine import OptimizerConfig
from mmpretrain.core.errors import ConfigError
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.training.muon import MuonAdamW, Piece, Place, orthogonalised
from mmpretrain.training.optimizer import build_optimizer, hidden_matrices

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def named_hidden(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if any(p is matrix for matrix in hidden_matrices(model))}


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 0.01 for p in model.parameters()]


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_one_and_the_same_singular_vectors(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix).float()
    inside = (left.T @ found @ right.T).diagonal()
    assert inside.min() > 0.5 and inside.max() < 1.3
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape, dtype=torch.bfloat16))


def test_hidden_matrices_are_the_linear_layers_of_blocks_and_nothing_else() -> None:
    model = build_model({"itc": InfoNCEConfig()})
    names = named_hidden(model)
    assert "towers.image.transformer.blocks.1.attention.in_proj.weight" in names
    assert all(".blocks." in name and name.endswith("weight") for name in names)
    assert not any(part in name for name in names for part in ("stem", "projections", "norm", "bias", "logit"))
    assert len(names) == 4 * (2 + 2 + 1)


def test_a_step_is_that_of_muon_and_adamw_of_torch() -> None:
    """On the same gradients for three steps; updates have the size of AdamW's."""
    ours = build_model({"itc": InfoNCEConfig()})
    theirs = copy.deepcopy(ours)
    hidden = named_hidden(theirs)
    parameters = dict(theirs.named_parameters())
    rest = [p for name, p in parameters.items() if name not in hidden]
    bare = [p for p in rest if sum(size > 1 for size in p.shape) < 2]
    matrices = [p for p in rest if sum(size > 1 for size in p.shape) >= 2]
    muon = torch.optim.Muon(
        [parameters[name] for name in hidden], **SETTINGS, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": matrices}, {"params": bare, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, **SETTINGS, betas=(0.9, 0.98), eps=1e-6, fused=True)
    config = OptimizerConfig(kind="muon", **SETTINGS, clip_grad_norm=0.0)
    optimizers = [build_optimizer(ours, config, 0), muon, adamw]
    for step in range(3):
        for model in (ours, theirs):
            for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # one unit in the last place of bf16's eight, in which both multiply, times the rate and the size of an update
        atol = 3 * 1e-2 * 2**-8 if name in hidden else 1e-7
        torch.testing.assert_close(one, other, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_part_of_a_matrix_moves_as_it_does_in_the_whole() -> None:
    """One rank that holds all of two matrices, one behind the other with a gap between them."""
    torch.manual_seed(0)
    wholes = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8, 2))]
    flat = nn.Parameter(torch.cat([wholes[0].detach().flatten(), torch.zeros(3), wholes[1].detach().flatten()]))
    places = [Place((4, 6), (Piece(0, 0, 24),)), Place((8, 2), (Piece(27, 0, 16),))]
    one, other = (MuonAdamW([{"params": params, "orthogonal": True}], **SETTINGS) for params in (wholes, [flat]))
    other.places = {flat: places}
    for step in range(2):
        for parameter, gradient in zip(wholes, [torch.randn(4, 6), torch.randn(8, 2)], strict=True):
            parameter.grad = gradient + step
        flat.grad = torch.cat([wholes[0].grad.flatten(), torch.zeros(3), wholes[1].grad.flatten()])
        one.step()
        other.step()
    assert torch.equal(flat[:24].view(4, 6), wholes[0]) and torch.equal(flat[27:].view(8, 2), wholes[1])
    assert not flat[24:27].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.momentum=0.9"], "is Muon's and the kind is adamw; set betas, or kind to muon"),
        (["optimizer.kind=muon", "optimizer.momentum=1.0"], "optimizer.momentum"),
        (["optimizer.kind=muon", "engine.offload=optimizer"], "muon gathers momentum between GPUs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(configs_folder() / "demo.yaml", overrides)
