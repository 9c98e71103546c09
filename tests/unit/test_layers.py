"""Layers against NumPy, torch's convolution and their own formulas."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmpretrain.core.errors import ConfigError
from mmpretrain.layers.attention import CrossAttention, SelfAttention
from mmpretrain.layers.blocks import Block, CrossBlock, Transformer, quick_gelu
from mmpretrain.layers.initialization import BlockScales
from mmpretrain.layers.pixels import Normalise, cut_patches
from mmpretrain.layers.pooling import at_first, masked_mean
from mmpretrain.layers.positions import sincos

WIDTH, HEADS = 8, 2


def softmax_attention(queries, keys, values, allowed):
    """Multi-head attention over [B, L, D] in NumPy, heads side by side in D."""
    rows, length, width = queries.shape
    out = np.zeros((rows, length, width))
    for row in range(rows):
        for head in range(HEADS):
            part = slice(head * width // HEADS, (head + 1) * width // HEADS)
            scores = queries[row][:, part] @ keys[row][:, part].T / np.sqrt(width // HEADS)
            scores = np.where(allowed[row], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[row][:, part] = weights / weights.sum(axis=-1, keepdims=True) @ values[row][:, part]
    return out


def linear(layer, values):
    return values @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def double(module):
    torch.manual_seed(0)
    return module.double()


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_the_softmax_of_the_paper(causal):
    layer = double(SelfAttention(HEADS, BlockScales(WIDTH, 2), causal))
    tokens = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    mask = None if causal else torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
    allowed = np.tril(np.ones((5, 5), bool))[None].repeat(3, 0) if causal else mask.numpy()[:, None]
    queries, keys, values = np.split(linear(layer.in_proj, tokens.numpy()), 3, axis=-1)
    expected = linear(layer.out_proj, softmax_attention(queries, keys, values, allowed))
    np.testing.assert_allclose(layer(tokens, mask).detach().numpy(), expected, atol=1e-12)


def test_cross_attention_reads_keys_and_values_from_the_context():
    layer = double(CrossAttention(HEADS, BlockScales(WIDTH, 2)))
    tokens, context = (torch.randn(2, n, WIDTH, dtype=torch.float64) for n in (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1]]).bool()
    keys, values = np.split(linear(layer.key_value, context.numpy()), 2, axis=-1)
    mixed = softmax_attention(linear(layer.query, tokens.numpy()), keys, values, mask.numpy()[:, None])
    np.testing.assert_allclose(layer(tokens, context, mask).detach().numpy(), linear(layer.out_proj, mixed), atol=1e-12)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_checkpointed_block_has_exactly_the_same_gradients(kind):
    torch.manual_seed(0)
    scales = BlockScales(WIDTH, 1)
    block = Block(scales, HEADS, 16) if kind == "self" else CrossBlock(scales, HEADS, 16)
    twin = copy.deepcopy(block)
    twin.gradient_checkpointing = True
    inputs = (torch.randn(2, 3, WIDTH), None)
    inputs = inputs if kind == "self" else (inputs[0], torch.randn(2, 5, WIDTH), None, None)
    for each in (block, twin):
        each(*inputs).square().sum().backward()
    for plain, checkpointed in zip(block.parameters(), twin.parameters(), strict=True):
        assert torch.equal(plain.grad, checkpointed.grad)


def test_a_checkpointed_stack_keeps_less_for_the_backward():
    tokens = torch.randn(2, 64, WIDTH)

    def kept(checkpointing):
        stack, sizes = Transformer(WIDTH, 4, HEADS), []
        for block in stack.blocks:
            block.gradient_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            stack(tokens)
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def test_quick_gelu_is_the_sigmoid_approximation():
    values = np.linspace(-3, 3, 7)
    np.testing.assert_allclose(quick_gelu(torch.tensor(values)), values / (1 + np.exp(-1.702 * values)), atol=1e-12)


def test_patches_times_a_matrix_are_a_strided_convolution():
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    convolved = functional.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cut_patches(images, 4) @ weight.flatten(1).T, convolved, atol=1e-4, rtol=1e-4)


def test_normalising_bytes_is_the_textbook_formula():
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 0.2)
    values = torch.arange(24, dtype=torch.uint8).view(2, 12) * 10
    channels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    expected = (values.numpy() / 255 - np.array(mean)[channels]) / np.array(std)[channels]
    np.testing.assert_allclose(Normalise(mean, std, repeat=4)(values), expected, atol=1e-6)


def test_fixed_positions_encode_column_and_row_by_sines_and_cosines():
    table = sincos((3, 3), 8).numpy()
    column, row = 2, 1
    angles = [column, column / 100, row, row / 100]
    expected = [np.sin(angles[:2]), np.cos(angles[:2]), np.sin(angles[2:]), np.cos(angles[2:])]
    np.testing.assert_allclose(table[row * 3 + column], np.concatenate(expected), atol=1e-6)


def test_fixed_positions_of_a_video_put_time_last_and_those_of_a_line_need_one_axis():
    line, clip = sincos((5,), 4).numpy(), sincos((2, 3, 5), 16)
    np.testing.assert_allclose(line[4], [np.sin(4), np.sin(4 / 100), np.cos(4), np.cos(4 / 100)], atol=1e-6)
    assert clip.shape == (30, 16)
    assert torch.equal(clip[:15, :12], clip[15:, :12])
    assert clip[0, 12:].tolist() == [0, 0, 1, 1]
    assert clip[15, 12].item() == pytest.approx(np.sin(1))
    with pytest.raises(ConfigError, match=r"width 8 cannot hold fixed positions of a grid \[2, 3, 5\].* of 16"):
        sincos((2, 3, 5), 8)


def test_the_masked_mean_ignores_padding_and_is_zero_without_tokens():
    tokens = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [6.0], [7.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    assert masked_mean(tokens, mask).tolist() == [[2.0], [0.0]]


def test_pooling_reads_the_first_end_token():
    ids = torch.tensor([[5, 9, 0, 9], [9, 1, 2, 3], [1, 2, 3, 4]])
    tokens = torch.arange(12.0).view(3, 4, 1)
    assert at_first(tokens, ids, 9).flatten().tolist() == [1.0, 4.0, 8.0]


def test_blocks_start_with_the_deviations_of_clip():
    torch.manual_seed(0)
    width, depth = 256, 8
    block = Transformer(width, depth, 4).blocks[0]
    wanted = {
        block.attention.in_proj: width**-0.5,
        block.attention.out_proj: width**-0.5 * (2 * depth) ** -0.5,
        block.mlp.fc1: (2 * width) ** -0.5,
        block.mlp.fc2: width**-0.5 * (2 * depth) ** -0.5,
    }
    for layer, std in wanted.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not layer.bias.any()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bf16_on_a_cpu_is_that_of_fp32(causal: bool) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(2, BlockScales(16, 1), causal=causal)
    tokens = torch.randn(3, 9, 16)
    mask = None if causal else torch.arange(9) < torch.tensor([[9], [5], [1]])
    exact = layer(tokens, mask)
    rounded = layer.bfloat16()(tokens.bfloat16(), mask)
    torch.testing.assert_close(rounded.float(), exact, atol=2e-2, rtol=2e-2)
