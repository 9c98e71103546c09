"""Linear layers in 8-bit floats against the same roundings in float64, and where they are refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmpretrain.cli import main
from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.layers import float8
from mmpretrain.layers.blocks import Transformer
from mmpretrain.layers.initialization import Linear
from mmpretrain.training.float8 import switch_on, use_float8

BF16 = 2**-8


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of values in float64 after 8 bits: scaled so that the largest is the type's own."""
    largest = torch.finfo(dtype).max
    factor = values.abs().max().item() / largest
    return (values.double() / factor).to(torch.float32).to(dtype).double() * factor


def operands(rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(*rows, 48, generator=generator) * torch.logspace(-2, 1, 48)
    weight = torch.randn(32, 48, generator=generator) / 7
    bias, grad = torch.randn(32, generator=generator), torch.randn(*rows, 32, generator=generator) / 1000
    return inputs.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To the rounding of bf16, of the whole as of the sums that cancel."""
    error = (found.double() - expected).abs()
    assert (error <= BF16 * expected.abs() + 1e-4 * expected.abs().max()).all(), error.max()


@pytest.mark.parametrize("rows", [(16,), (3, 7), (1, 1)])
def test_a_layer_and_its_gradients_are_those_of_the_rounded_operands(rows: tuple[int, ...]) -> None:
    inputs, weight, bias, grad = operands(rows)
    found = float8.linear(inputs, weight, bias)
    assert found.dtype == torch.bfloat16 and found.shape == (*rows, 32)
    flat = rounded(inputs.detach().flatten(0, -2), torch.float8_e4m3fn)
    small = rounded(weight.detach(), torch.float8_e4m3fn)
    product = (flat @ small.T).to(torch.bfloat16).double()
    assert_close(found.detach().flatten(0, -2), product + bias.detach().bfloat16().double())

    found.backward(grad.bfloat16())
    back = rounded(grad.bfloat16().float().flatten(0, -2), torch.float8_e5m2)
    assert inputs.grad is not None and weight.grad is not None and bias.grad is not None
    assert inputs.grad.dtype == weight.grad.dtype == torch.float32
    assert_close(inputs.grad.flatten(0, -2), back @ small)
    assert_close(weight.grad, back.T @ flat)


def test_eight_bits_stay_near_the_exact_product() -> None:
    inputs, weight, _, _ = operands((64,))
    exact = inputs.double() @ weight.double().T
    error = (float8.linear(inputs, weight).double() - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05, "three bits of mantissa: about 2 to 4 %"


def test_zeros_give_zeros() -> None:
    weight = torch.zeros(16, 16, requires_grad=True)
    product = float8.linear(torch.zeros(2, 16), weight)
    product.sum().backward()
    assert product.count_nonzero() == 0 and weight.grad is not None and weight.grad.count_nonzero() == 0


def test_only_wide_layers_of_blocks_change_and_only_while_they_train() -> None:
    model = torch.nn.ModuleDict({"wide": Transformer(1024, 1, 16), "narrow": Transformer(64, 1, 4)})
    model["head"] = Linear(1024, 1024, std=0.02)
    assert switch_on(model) == 4
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert {name.split(".")[0] for name, layer in layers.items() if layer.float8} == {"wide"}
    layer = next(layer for layer in layers.values() if layer.float8)
    inputs = torch.randn(2, layer.in_features)
    assert layer(inputs).dtype == torch.bfloat16
    assert layer.eval()(inputs).dtype == torch.float32


def test_a_model_without_wide_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine.float8 is for linear layers of 1024 and wider and no block"):
        switch_on(Transformer(64, 1, 4))


def test_a_device_without_8_bit_units_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"engine.float8 needs a GPU .*this is a CPU; set engine.float8 to false"):
        use_float8(Transformer(1024, 1, 16), torch.device("cpu"))


def test_another_precision_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("defaults: [demo]\n")
    with pytest.raises(SystemExit) as caught:
        main(["config", "check", str(tmp_path / "run.yaml"), "engine.float8=true", "precision=fp32"])
    assert caught.value.code == 2
    assert "engine.float8=true: gives bf16 and the precision is fp32; set precision to bf16" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_block_in_8_bits_trains_on_a_gpu() -> None:
    device = torch.device("cuda")
    block = Transformer(1024, 1, 16).to(device)
    use_float8(block, device)
    inputs = torch.randn(4, 50, 1024, device=device)
    with torch.autocast("cuda", torch.bfloat16):
        loss = block(inputs).square().mean()
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in block.parameters())
