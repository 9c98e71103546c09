"""Video towers of torchvision and the two-stream tower, against torchvision's own networks."""

import copy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models import get_model, get_model_weights

from mmpretrain.core.config import parse_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec
from mmpretrain.layers.batch_norm import replace_batch_norm
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.convnets import ARCHITECTURES, build_trunk
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.torchvision import TorchvisionTowerConfig
from mmpretrain.models.towers.two_stream import TwoStreamTowerConfig

PUBLISHED_MILLIONS = {"r3d_18": 33.4, "r2plus1d_18": 31.5, "s3d": 8.3, "swin3d_t": 28.2, "resnet50": 25.6}
CLIPS = {"r3d_18": (16, 16), "r2plus1d_18": (16, 16), "s3d": (16, 32), "swin3d_t": (4, 32)}
"""Frames and pixels of a small clip; of more than one place in space or time."""
IMAGE = {
    "kind": "native",
    "stem": {"kind": "patches", "image_size": 32, "patch_size": 16},
    "width": 24,
    "depth": 1,
    "heads": 4,
    "pooling": "class",
}
FRAMES = {"kind": "frames", "image": IMAGE, "frames": 8, "depth": 1, "heads": 4}
TUBES = IMAGE | {"stem": {"kind": "tubes", "frames": 8, "image_size": 32, "patch_size": 16}}


def build(**tower: object) -> MultimodalTransformer:
    torch.manual_seed(0)
    return MultimodalTransformer.create(ModelConfig.model_validate({"embed_dim": 8, "towers": {"video": tower}}), {})


def clips_for(model: MultimodalTransformer, rows: int = 2) -> torch.Tensor:
    shape = model.config.parsed_model().inputs["video"].shape
    return torch.randint(0, 256, (rows, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def last_map(network: nn.Module, name: str, pixels: torch.Tensor) -> torch.Tensor:
    """What stands before the pooling of torchvision's network, [B, L, C]."""
    seen: list[torch.Tensor] = []
    network.get_submodule("avgpool").register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    if name == "s3d":
        network.avgpool = nn.Identity()  # its own wants seven places in space
        network.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(pixels)
    return seen[0].flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_trunk_has_the_published_number_of_parameters_but_for_the_head(name: str, trained: bool) -> None:
    with torch.device("meta"):
        whole = get_model(name)
        ours = sum(parameter.numel() for parameter in build_trunk(name, trained).parameters())
        head = next(whole.get_submodule(part) for part in ("fc", "classifier", "head") if hasattr(whole, part))
    published = get_model_weights(name).DEFAULT.meta["num_params"]
    assert ours + sum(parameter.numel() for parameter in head.parameters()) == published
    assert published / 1e6 == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.05)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pixels_are_normalised_as_the_published_weights_want_them(name: str) -> None:
    published = get_model_weights(name).DEFAULT.transforms()
    mean, std = ARCHITECTURES[name].statistics
    assert (list(mean), list(std)) == (pytest.approx(published.mean), pytest.approx(published.std))


@pytest.mark.parametrize("name", CLIPS)
def test_a_video_tower_is_the_network_of_torchvision_with_its_statistics_frozen(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = get_model(name)
    frames, size = CLIPS[name]
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    tower = {"kind": "torchvision", "name": name, "frames": frames, "image_size": size}
    model = build(**tower, weights=str(tmp_path / "weights.pth")).train()
    clips = clips_for(model)
    mean, std = (torch.tensor(values)[:, None, None] for values in ARCHITECTURES[name].statistics)
    expected = last_map(theirs.eval(), name, ((clips / 255 - mean) / std).transpose(1, 2))
    found, facts = model.towers["video"](clips), model.towers["video"].facts()
    torch.testing.assert_close(found["tokens"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["pooled"], expected.mean(dim=1), atol=1e-4, rtol=1e-4)
    assert found["tokens"].shape[1:] == (facts.num_tokens, facts.width) and facts.num_tokens > 1
    torch.testing.assert_close(model.towers["video"](clips[:1])["tokens"], expected[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CLIPS)
def test_a_fresh_video_tower_has_no_chance_no_neighbours_and_exact_checkpoints(name: str) -> None:
    frames, size = CLIPS[name]
    model = build(kind="torchvision", name=name, frames=frames, image_size=size).train()
    tower, clips = model.towers["video"], clips_for(model)
    gradients, kept, pooled = [], [], []
    for policy in ("none", "block"):
        model.set_activation_checkpointing(policy)
        tower.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            pooled.append(tower(clips)["pooled"])
        pooled[-1].square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
        kept.append(sum(sizes))
    torch.testing.assert_close(pooled[0], pooled[1], atol=0, rtol=0)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)
    assert kept[1] < kept[0] / 2
    with torch.no_grad():
        other = tower(torch.cat([clips[:1], clips[1:].flip(-1)]))["pooled"]
    assert torch.equal(other[0], pooled[0][0]) and not torch.allclose(other[1], pooled[0][1])


def test_batch_norm_is_replaced_by_what_it_computes_in_evaluation_or_by_group_norm() -> None:
    norms = nn.Sequential(nn.BatchNorm1d(48), nn.Sequential(nn.BatchNorm2d(45)), nn.BatchNorm3d(6))
    for norm in (norms[0], norms[1][0], norms[2]):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    fixed, grouped = copy.deepcopy(norms), copy.deepcopy(norms)
    replace_batch_norm(fixed, trained=True)
    replace_batch_norm(grouped, trained=False)
    shapes = ((5, 48, 7), (5, 45, 3, 4), (5, 6, 2, 3, 3))
    for theirs, ours, shape in zip((norms[0], norms[1], norms[2]), fixed, shapes, strict=True):
        values = torch.randn(shape)
        torch.testing.assert_close(ours.train()(values), theirs.eval()(values))
    assert [module.num_groups for module in grouped.modules() if isinstance(module, nn.GroupNorm)] == [24, 15, 3]


@pytest.mark.parametrize("rgb", [FRAMES, TUBES], ids=["frames", "native"])
@pytest.mark.parametrize("join", ["tokens", "late"])
def test_two_streams_give_what_is_seen_and_how_it_moves(rgb: dict[str, object], join: str) -> None:
    model = build(kind="two_stream", rgb=rgb, join=join, flow_frames=3)
    assert model.config.parsed_model().inputs == {"video": FieldSpec((8, 3, 32, 32), "uint8")}
    tower, clips = model.towers["video"], clips_for(model)
    found, facts, seen = tower(clips), tower.facts(), tower.rgb(clips)
    stacks = tower.motions(clips)
    assert stacks.shape == (2, 2, 6, 32, 32) and stacks.abs().max() <= 1
    moved = [tower.flow_adapter(tower.flow_trunk(stacks[:, stack])) for stack in range(2)]
    still = tower.rgb_adapter(seen["tokens"])
    pooled = torch.stack([tower.rgb_adapter(seen["pooled"][:, None])[:, 0], torch.cat(moved, 1).mean(1)], 1)
    torch.testing.assert_close(found["pooled"], pooled.mean(1))
    torch.testing.assert_close(found["tokens"], torch.cat([still, *moved], 1) if join == "tokens" else pooled)
    assert found["tokens"].shape[1:] == (facts.num_prefix + facts.num_tokens, facts.width)
    sum(value.square().sum() for value in found.values()).backward()
    learns = {name for name, p in tower.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, _ in tower.named_parameters()} == learns


def test_stacks_hold_motions_in_pixels_across_then_down_without_the_cameras() -> None:
    model = build(kind="two_stream", rgb=TUBES, flow_frames=3, longest_motion=4.0, subtract_mean=False)
    tower = model.towers["video"]
    flow = torch.arange(7.0)[:, None, None, None] + torch.tensor([0.0, -9.0])[:, None, None] + torch.eye(32)
    tower.flow.forward = lambda clips: flow[None, : clips.shape[1] - 1]
    stacks = tower.motions(clips_for(model, rows=1))
    expected = torch.stack([flow[t, axis] for t in range(3) for axis in range(2)]) / 4
    torch.testing.assert_close(stacks[0, 0], expected.clamp(-1, 1))
    assert stacks.shape[1] == 2 and stacks[0, 1, 0].max() == 1
    still = build(kind="two_stream", rgb=TUBES, flow_frames=3, longest_motion=4.0).towers["video"]
    still.flow.forward = tower.flow.forward
    torch.testing.assert_close(still.motions(clips_for(model, rows=1))[0, 0, 1], (torch.eye(32) - 1 / 32) / 4)


def test_a_two_stream_tower_is_rebuilt_from_its_folder(tmp_path: Path) -> None:
    trunk = build_trunk("resnet18", trained=True, channels=6)
    torch.save(trunk.state_dict(), tmp_path / "flow.pth")
    model = build(kind="two_stream", rgb=FRAMES, flow_frames=3, flow_weights=str(tmp_path / "flow.pth"))
    loaded = model.towers["video"].flow_trunk.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trunk.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "flow.pth").unlink()
    again = MultimodalTransformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.embed("video", clips_for(model)), model.embed("video", clips_for(model)))


def test_blocks_stand_in_the_order_in_which_values_pass_them() -> None:
    with torch.device("meta"):
        residual = TorchvisionTowerConfig(name="r3d_18").build("video")
        swin = TorchvisionTowerConfig(name="swin3d_t").build("video")
        streams = TwoStreamTowerConfig.model_validate({"rgb": FRAMES, "flow_frames": 3}).build("video")
    assert residual.blocks() == [residual.trunk.get_submodule(f"layer{number}") for number in range(1, 5)]
    assert len(swin.blocks()) == 7
    flow = [streams.flow_trunk.get_submodule(f"layer{number}") for number in range(1, 5)]
    image, time = streams.rgb.image.transformer.blocks, streams.rgb.transformer.blocks
    assert streams.blocks() == [flow[0], image[0], flow[1], flow[2], time[0], flow[3]]


def test_video_towers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="frames: s3d shrinks it 8 times; use 8"):
        parse_config(TorchvisionTowerConfig, "{name: s3d, frames: 12}", "run.yaml")
    with pytest.raises(ConfigError, match="image_size: r3d_18 shrinks it 16 times; use 112"):
        parse_config(TorchvisionTowerConfig, "{name: r3d_18, image_size: 120}", "run.yaml")
    with pytest.raises(ConfigError, match="frames: resnet50 reads single images; remove it, or put it into a tower"):
        parse_config(TorchvisionTowerConfig, "{name: resnet50, frames: 8}", "run.yaml")
    with pytest.raises(ValidationError, match="name s3d reads videos, not 'image'; name the tower video"):
        ModelConfig.model_validate({"towers": {"image": {"kind": "torchvision", "name": "s3d"}}})
    with pytest.raises(ConfigError, match="'/nowhere/a.pth' is no file; give the path"):
        build(kind="torchvision", name="s3d", weights="/nowhere/a.pth")
    with pytest.raises(ConfigError, match="clip of 8 frames has no stack of 10 motions; set flow_frames .* to 7"):
        build(kind="two_stream", rgb=FRAMES)
    raft = {"kind": "raft", "weights": "C_T_V2"}
    with pytest.raises(
        ConfigError, match="raft reads frames of 128 pixels and more in steps of 8, the rgb tower has 32"
    ):
        build(kind="two_stream", rgb=FRAMES, flow_frames=3, flow=raft)
    with pytest.raises(ValidationError, match="a tower of kind two_stream reads videos, not 'image'"):
        ModelConfig.model_validate({"towers": {"image": {"kind": "two_stream", "rgb": FRAMES}}})
    with pytest.raises(
        ValidationError, match="patch_dropout of the rgb tower inside a tower of kind two_stream is not"
    ):
        build(kind="two_stream", rgb=TUBES | {"patch_dropout": 0.5}, flow_frames=3)
    with pytest.raises(ValidationError, match="a window of 8 pixels has no middle; use 9"):
        build(kind="two_stream", rgb=TUBES, flow_frames=3, flow={"kind": "lucas_kanade", "window": 8})
    model = build(kind="two_stream", rgb=FRAMES, flow_frames=3)
    for keeper in (model.towers["video"], build(kind="torchvision", name="s3d", image_size=32).towers["video"]):
        with pytest.raises(ConfigError, match="masked autoencoding needs kind native"):
            keeper(clips_for(model), keep=torch.zeros(2, 1, dtype=torch.int64))
