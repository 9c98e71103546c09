"""Matrix products under bf16 autocast, also on CPUs that have no instructions for them.

Enter: operands as autocast finds them. Leave: operands rounded to bf16, multiplied and summed in fp32, rounded to bf16,
in forward and backward, which is what a bf16 kernel gives. Without AVX-512 PyTorch's own bf16 kernels take some 15
times as long as its fp32 kernels (torch 2.14, AVX2), so there the fp32 kernels multiply the rounded operands.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from mmpretrain.layers.kernels import kernel_device


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 faster than PyTorch's reference kernels do."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [..., K] by [N, K] to [..., N]."""
    if not _is_emulated(inputs):
        return F.linear(inputs, weight, bias)
    product: Tensor = _RoundedLinear.apply(inputs, weight, bias)
    return product


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`scaled_dot_product_attention` of bf16 operands [B, H, L, D], computed in fp32."""
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, is_causal=causal)
        return mixed.to(query.dtype)


def _is_emulated(inputs: Tensor) -> bool:
    return (
        kernel_device(inputs.device) == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and not has_bf16_products()
    )


class _Context(FunctionCtx):
    """What the backward needs."""

    saved_tensors: tuple[Tensor, Tensor]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None]


class _RoundedLinear(torch.autograd.Function):
    """Keeps the operands in bf16, as autocast does, and widens them anew for each product."""

    @staticmethod
    def forward(ctx: _Context, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounded, rounded_weight = inputs.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rounded, rounded_weight)
        ctx.dtypes = (inputs.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast("cpu", enabled=False):
            added = None if bias is None else bias.bfloat16().float()
            return F.linear(rounded.float(), rounded_weight.float(), added).bfloat16()

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        (inputs, weight), (inputs_dtype, weight_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        with torch.autocast("cpu", enabled=False):
            wide = grad.float().flatten(0, -2)
            to_inputs = (wide @ weight.float()).view_as(inputs).bfloat16().to(inputs_dtype)
            to_weight = (wide.T @ inputs.float().flatten(0, -2)).bfloat16().to(weight_dtype)
            to_bias = None if bias_dtype is None else wide.sum(0).bfloat16().to(bias_dtype)
        return to_inputs, to_weight, to_bias
