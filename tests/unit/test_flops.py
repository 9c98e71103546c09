"""FLOPs of a training row against arithmetic by hand, and the share of a device's peak that a rate comes to."""

import pytest
import torch
from tiny_model import IMAGE_SIZE, LENGTH, MODEL, PATCH_SIZE, VOCABULARY, rows_of

from mmpretrain.core.accelerators import peak_flops
from mmpretrain.core.types import FieldSpec
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.flops import training_flops
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.mlm import MLMConfig
from mmpretrain.training.utilization import Utilization

WIDTH, DEPTH = 32, 2
PATCHES, PIXELS = (IMAGE_SIZE // PATCH_SIZE) ** 2, 3 * PATCH_SIZE**2
FIELDS = {
    name: FieldSpec(tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
    for name, tensor in rows_of([5]).items()
}


def model_of(**objectives: ObjectiveConfig) -> MultimodalTransformer:
    with torch.device("meta"):
        return MultimodalTransformer.create(resolve(ModelConfig.model_validate(MODEL), None), objectives)


def blocks_forward(tokens: int) -> int:
    """Queries, keys, values, output; an MLP of four times the width; scores and their mixture."""
    return DEPTH * (2 * tokens * WIDTH * WIDTH * (3 + 1 + 4 + 4) + 2 * 2 * tokens * tokens * WIDTH)


def test_a_row_of_a_dual_encoder_costs_what_its_matrices_say() -> None:
    """The backward of a product is two; pixels alone need no gradient."""
    project = 2 * WIDTH * MODEL["embed_dim"]
    cut = 2 * PATCHES * PIXELS * WIDTH
    image = 3 * (blocks_forward(PATCHES + 1) + project) + 2 * cut
    text = 3 * (blocks_forward(LENGTH) + project)
    assert training_flops(model_of(itc=InfoNCEConfig()), FIELDS) == image + text


def test_a_frozen_tower_costs_its_forward_alone() -> None:
    whole, frozen = model_of(itc=InfoNCEConfig()), model_of(itc=InfoNCEConfig())
    frozen.towers["image"].requires_grad_(False)
    saved = 2 * blocks_forward(PATCHES + 1) + 2 * PATCHES * PIXELS * WIDTH + 2 * WIDTH * MODEL["embed_dim"]
    assert training_flops(whole, FIELDS) - training_flops(frozen, FIELDS) == saved


def test_a_vocabulary_and_a_fusion_count_too() -> None:
    contrast = training_flops(model_of(itc=InfoNCEConfig()), FIELDS)
    both = training_flops(model_of(itc=InfoNCEConfig(), words=MLMConfig(condition_on=("image",))), FIELDS)
    assert both > contrast + 3 * (blocks_forward(LENGTH) + 2 * WIDTH * VOCABULARY)


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "fp32", 66.9),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10G", "bf16", 70.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA GeForce GTX 1080", "fp16", None),
        ("CPU", "fp32", None),
    ],
)
def test_a_device_is_known_by_the_name_its_driver_gives(name: str, precision: str, tera: float | None) -> None:
    peak = peak_flops(name, precision)  # type: ignore[arg-type]
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))


def test_the_share_of_the_peak_is_told_where_the_device_is_known() -> None:
    """100 samples/s of 2 TFLOP each on a device that can do 1000 TFLOP/s."""
    assert Utilization(2e12, 1e15).metrics(100.0) == {"train/tflops_per_gpu": 200.0, "train/mfu": 20.0}
    assert Utilization(2e12, None).metrics(100.0) == {"train/tflops_per_gpu": 200.0}
    assert Utilization().metrics(100.0) == {}
