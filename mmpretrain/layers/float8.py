"""Linear layers whose products are of 8-bit floats, for GPUs that have units for them.

Enter: operands of any type. Leave: bf16, as a bf16 layer gives, from operands rounded to 8 bits: activations and
weights to E4M3, gradients to E5M2 (arXiv 2209.05433, section 3), each tensor scaled by its own largest magnitude, which
is looked up at each use. Weights, their gradients and all that is not such a product keep their types.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

MULTIPLE = 16
"""What every dimension of an 8-bit product is a multiple of."""


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: [..., K] by [N, K] to [..., N] in bf16; K and N are multiples of 16."""
    product: Tensor = _Float8Linear.apply(inputs, weight)
    return product if bias is None else product + bias.bfloat16()


def _rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values [M, K] as 8-bit floats, and the fp32 factor [] that gives them back."""
    largest = torch.finfo(dtype).max
    factor = values.detach().abs().amax().float().clamp(min=1e-12) / largest
    return (values.float() / factor).clamp(-largest, largest).to(dtype), factor


def _product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """[M, K] by [N, K] to [M, N] in bf16, summed in fp32."""
    (left, left_factor), (right, right_factor) = first, second
    return torch._scaled_mm(left, right.t(), scale_a=left_factor, scale_b=right_factor, out_dtype=torch.bfloat16)


def _turned(operand: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    values, factor = operand
    return values.t().contiguous(), factor


class _Context(FunctionCtx):
    """What the backward needs."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]
    shape: torch.Size
    dtype: torch.dtype


class _Float8Linear(torch.autograd.Function):
    """Keeps its input in 8 bits; rounds the weight anew in the backward, by when ZeRO-3 has gathered it again."""

    @staticmethod
    def forward(ctx: _Context, inputs: Tensor, weight: Tensor) -> Tensor:
        rounded = _rounded(_padded(inputs), torch.float8_e4m3fn)
        ctx.save_for_backward(*rounded, weight)
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        product = _product(rounded, _rounded(weight, torch.float8_e4m3fn))
        return _unpadded(product, inputs.shape)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor]:
        values, factor, weight = ctx.saved_tensors
        rounded = _rounded(_padded(grad), torch.float8_e5m2)
        to_inputs = _product(rounded, _turned(_rounded(weight, torch.float8_e4m3fn)))
        to_weight = _product(_turned(rounded), _turned((values, factor)))
        return _unpadded(to_inputs, ctx.shape).to(ctx.dtype), to_weight.to(weight.dtype)


def _padded(values: Tensor) -> Tensor:
    """[..., K] as [M, K] with rows of zeros up to a multiple of 16."""
    flat = values.flatten(0, -2)
    return F.pad(flat, (0, 0, 0, -len(flat) % MULTIPLE))


def _unpadded(product: Tensor, shape: torch.Size) -> Tensor:
    """The rows of [..., K] among [M, N], as [..., N]."""
    return product[: shape[:-1].numel()].view(*shape[:-1], -1)
