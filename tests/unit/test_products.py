"""Products in bf16 on CPUs without instructions for them, beside PyTorch's own kernels."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.layers import products


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has no such instructions."""
    monkeypatch.setattr(products, "has_bf16_products", lambda: False)


def output_and_gradients(layer, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [part.clone().requires_grad_() for part in (inputs, weight, bias) if part is not None]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(*leaves)
    output.square().float().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_gives_what_the_bf16_kernel_gives(without_bf16: None, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(3, 5, 24).to(dtype), torch.randn(16, 24)
    bias = torch.randn(16) if biased else None
    ours = output_and_gradients(products.linear, inputs, weight, bias)
    kernel = output_and_gradients(F.linear, inputs, weight, bias)
    assert [part.dtype for part in ours] == [part.dtype for part in kernel]
    for our_part, kernel_part in zip(ours, kernel, strict=True):
        # one unit in the last of bf16's eight places: sums in fp32 in another order round to a neighbour at most
        torch.testing.assert_close(our_part.double(), kernel_part.double(), rtol=2**-7, atol=2**-7)


def test_the_sums_are_not_rounded(without_bf16: None) -> None:
    """256 + 1 + ... + 1: a sum kept in bf16 would stay at 256, where it has a step of 2."""
    row = torch.ones(1, 65)
    row[0, 0] = 256.0
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(row, torch.ones(1, 65)).item() == 320.0


def test_other_precisions_are_left_alone(without_bf16: None) -> None:
    inputs, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(inputs, weight).dtype == torch.float64
    assert torch.equal(products.linear(inputs.float(), weight.float()), F.linear(inputs.float(), weight.float()))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_fp32_on_the_rounded_operands(causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8).bfloat16() for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours = products.attention(query, key, value, None, causal)
    logits = query.double() @ key.double().transpose(-2, -1) * 8**-0.5
    if causal:
        logits = logits.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(ours.double(), logits.softmax(-1) @ value.double(), rtol=2**-8, atol=2**-8)
