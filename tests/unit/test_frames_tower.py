"""The video tower that runs an image tower on every frame."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer

IMAGE = {
    "kind": "native",
    "stem": {"kind": "patches", "image_size": 16, "patch_size": 8},
    "width": 32,
    "depth": 1,
    "heads": 4,
}
FRAMES = {"kind": "frames", "image": IMAGE, "frames": 3, "depth": 1, "heads": 4}


def build(**options: object) -> MultimodalTransformer:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"embed_dim": 8, "towers": {"video": FRAMES | options}})
    assert config.inputs == {"video": FieldSpec((3, 3, 16, 16), "uint8")}
    return MultimodalTransformer.create(config, {})


def clips() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_each_frame_is_read_by_the_image_tower_and_sees_the_others() -> None:
    tower = build().towers["video"]
    seen: list[torch.Tensor] = []
    tower.positions.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    outputs = tower(clips())
    assert outputs["tokens"].shape == (2, 3, 32)
    for frame in range(3):
        torch.testing.assert_close(seen[0][:, frame], tower.image(clips()[:, frame])["pooled"])
    changed = clips()
    changed[:, 2] = 0
    assert not torch.allclose(tower(changed)["tokens"][:, 0], outputs["tokens"][:, 0])


def test_the_order_of_frames_matters() -> None:
    model, videos = build(), clips()
    assert not torch.allclose(model.embed("video", videos), model.embed("video", videos.flip(1)), atol=1e-4)


def test_a_tower_of_frames_is_rebuilt_from_its_folder(tmp_path: Path) -> None:
    model, videos = build(), clips()
    model.save_pretrained(tmp_path)
    again = MultimodalTransformer.from_pretrained(tmp_path)
    assert torch.equal(again.embed("video", videos), model.embed("video", videos))


def test_frames_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads 5 of the video tower do not divide the width 32 of its image tower"):
        build(heads=5)
    with pytest.raises(ValidationError, match="a tower of kind frames reads videos, not 'image'"):
        ModelConfig.model_validate({"towers": {"image": FRAMES}})
    with pytest.raises(ConfigError, match="cannot leave tubes out; masked autoencoding needs kind native"):
        build().towers["video"](clips(), keep=torch.zeros(2, 1, dtype=torch.int64))
