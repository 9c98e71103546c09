"""Starting from another model: published weights compute in our towers what they compute in transformers.

References: transformers' own models, timm's resampling of positions. Models are tiny and their weights random.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_export import clip_model, siglip_model
from timm.layers import resample_abs_pos_embed
from tiny_model import build_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.layers.resampling import inflate_kernel, resample_positions
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.finetune import FinetuneConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.parent import Parent, open_pretrained
from mmpretrain.models.trained_parts import prepare
from mmpretrain.models.transfer import Transfer, take_over
from mmpretrain.objectives.base import ObjectiveConfig
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.siglip import SigLIPConfig

LENGTH, VOCABULARY, EOS = 9, 60, 59
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = SIZES | {"hidden_size": 24, "intermediate_size": 96, "image_size": 16, "patch_size": 8}
TEXT = SIZES | {"hidden_size": 16, "intermediate_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
TEXT |= {"eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None}

TOWER = {"kind": "native", "depth": 2, "heads": 2, "activation": "quick_gelu"}
STEM = {"kind": "patches", "image_size": 16, "patch_size": 8}
WORDS = {"kind": "embeddings", "context_length": LENGTH, "vocab_size": VOCABULARY, "eos_id": EOS}
CLIP = {
    "image": TOWER | {"width": 24, "stem": STEM, "pooling": "class", "pre_norm": True},
    "text": TOWER | {"width": 16, "mlp_ratio": 2.0, "stem": WORDS, "pooling": "eos", "causal": True},
}


def child(
    towers: Mapping[str, object], embed_dim: int = 12, objectives: Mapping[str, ObjectiveConfig] | None = None
) -> MultimodalTransformer:
    torch.manual_seed(1)
    config = ModelConfig.model_validate({"embed_dim": embed_dim, "towers": towers})
    return MultimodalTransformer.create(resolve(config, None), objectives or {}).eval()


def saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """With every weight, norms and biases too, away from its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(vision_config=IMAGE | {"projection_dim": 12}, text_config=TEXT, projection_dim=12)
    saved(CLIPModel(config), folder)
    return folder


def warmed(folder: Path, model: MultimodalTransformer) -> tuple[MultimodalTransformer, Transfer]:
    parent = open_pretrained(str(folder), model.config.parsed_model().towers)
    return model, take_over(model, parent)


def pictures() -> Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def texts() -> tuple[Tensor, Tensor]:
    """Ids and mask of texts of 4, 6 and 9 tokens that end with the end token."""
    counts = torch.tensor([4, 6, 9])
    ids = torch.randint(1, EOS, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(3), counts - 1] = EOS
    mask = torch.arange(LENGTH) < counts[:, None]
    return ids.masked_fill(~mask, 0), mask


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def normalised(model: MultimodalTransformer, images: Tensor) -> Tensor:
    stem = model.config.parsed_model().towers["image"].stem
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (stem.mean, stem.std))
    return (images / 255 - mean) / std


def assert_same_embeddings(model: MultimodalTransformer, theirs: CLIPModel | SiglipModel) -> None:
    ids, mask = texts()
    with torch.no_grad():
        images = theirs.get_image_features(pixel_values=normalised(model, pictures())).pooler_output
        words = theirs.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(model.embed("image", pictures()), unit(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embed("text", ids, mask), unit(words), atol=1e-5, rtol=0)


def test_a_clip_model_embeds_the_same_in_native_towers(clip_folder: Path) -> None:
    model, transfer = warmed(clip_folder, child(CLIP, objectives={"contrast": InfoNCEConfig()}))
    theirs = CLIPModel.from_pretrained(clip_folder)
    assert_same_embeddings(model, theirs)
    assert model.objectives["contrast"].logit_scale().log().item() == pytest.approx(theirs.logit_scale.item())
    assert all(account.fresh == account.left_over == 0 for account in transfer.accounts.values())
    assert sum(account.loaded for account in transfer.accounts.values()) == sum(p.numel() for p in theirs.parameters())


def test_a_siglip_model_embeds_the_same_in_native_towers(tmp_path: Path) -> None:
    act = {"hidden_act": "gelu_pytorch_tanh"}
    theirs = saved(
        SiglipModel(SiglipConfig(vision_config=IMAGE | act, text_config=TEXT | act | {"projection_size": 24})), tmp_path
    )
    common = TOWER | {"activation": "gelu_tanh", "norm_eps": 1e-6}
    image = common | {"width": 24, "stem": STEM | {"bias": True}, "pooling": "map", "projection": False}
    text = common | {"width": 16, "mlp_ratio": 2.0, "stem": WORDS, "pooling": "last", "attend_padding": True}
    towers = {"image": image, "text": text | {"projection_bias": True}}
    model, transfer = warmed(tmp_path, child(towers, 24, {"sigmoid": SigLIPConfig()}))
    assert_same_embeddings(model, theirs)
    assert model.objectives["sigmoid"].logit_bias().item() == pytest.approx(theirs.logit_bias.item())
    assert all(account.fresh == account.left_over == 0 for account in transfer.accounts.values())


def test_a_vision_transformer_gives_the_same_tokens_in_a_native_tower(tmp_path: Path) -> None:
    theirs = saved(ViTForImageClassification(ViTConfig(**IMAGE, num_labels=7)), tmp_path)
    tower = TOWER | {"activation": "gelu", "norm_eps": 1e-12, "width": 24, "pooling": "class"}
    model, transfer = warmed(tmp_path, child({"image": tower | {"stem": STEM | {"bias": True}}}))
    with torch.no_grad():
        expected = theirs.vit(pixel_values=normalised(model, pictures())).last_hidden_state
        tokens = model.encoder({"image": pictures()}).tower("image")["tokens"]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    assert transfer.accounts["towers.image"].fresh == 0 and transfer.accounts["projections.image"].fresh == 24 * 12


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    saved(BertModel(BertConfig(**TEXT)), folder)
    return folder


def test_bert_goes_into_the_tower_of_its_own_architecture(bert_folder: Path, tmp_path: Path) -> None:
    BertConfig.from_pretrained(bert_folder).save_pretrained(tmp_path)
    tower = {"kind": "hf_auto", "name": str(tmp_path), "pretrained": False, "context_length": LENGTH}
    model, transfer = warmed(bert_folder, child({"text": tower}))
    ids, mask = texts()
    with torch.no_grad():
        theirs = BertModel.from_pretrained(bert_folder).eval()(ids, attention_mask=mask.long()).last_hidden_state
        tokens = model.encoder({"text": ids, "text.mask": mask}).tower("text")["tokens"]
    torch.testing.assert_close(tokens, theirs, atol=1e-5, rtol=0)
    assert transfer.accounts["towers.text"].fresh == 0


def test_what_native_towers_cannot_compute_is_refused_with_the_tower_that_can(bert_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none of its weights fit this model; .*set model.towers.text to \{kind"):
        warmed(bert_folder, child(CLIP))


def test_a_model_without_a_common_tower_or_size_is_refused_naming_why(clip_folder: Path, bert_folder: Path) -> None:
    wide = {"image": CLIP["image"] | {"width": 32}, "text": CLIP["text"] | {"width": 32}}
    with pytest.raises(CheckpointError, match="CLIPModel.*towers.image: 2 heads, width 24 there, 2 heads, width 32 he"):
        warmed(clip_folder, child(wide))
    other = {
        "kind": "hf_auto",
        "name": str(clip_folder),
        "pretrained": False,
        "context_length": LENGTH,
        "pooling": "mean",
    }
    with pytest.raises(CheckpointError, match="only towers of kind hf_auto and of this architecture can hold a bert"):
        warmed(bert_folder, child({"text": other}))


@pytest.mark.parametrize("name", ["no/such-model", "/nowhere/at/all", "{folder}"])
def test_a_name_that_leads_to_no_model_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = name.format(folder=tmp_path)
    with pytest.raises(CheckpointError, match=f"--from {name} is neither a run folder nor a checkpoint, and no model"):
        open_pretrained(name, {})


def test_a_published_folder_of_ours_is_taken_over_whole(tmp_path: Path) -> None:
    for source in (clip_model(), siglip_model()):
        source.save_pretrained(tmp_path)
        config = source.config.parsed_model()
        torch.manual_seed(5)
        model = MultimodalTransformer.create(config, source.config.parsed_objectives())
        _, transfer = warmed(tmp_path, model)
        state = model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in source.state_dict().items())
        assert all(account.fresh == account.left_over == 0 for account in transfer.accounts.values())


def test_settings_that_shapes_do_not_show_are_remarked_upon(clip_folder: Path) -> None:
    image = CLIP["image"] | {"activation": "gelu", "depth": 1, "stem": STEM | {"mean": [0.5, 0.5, 0.5]}}
    _, transfer = warmed(clip_folder, child({"image": image}))
    table = transfer.table()
    assert "activation is quick_gelu there, gelu here" in table and "depth is 2 there, 1 here" in table
    assert transfer.accounts["towers.image"].left_over > 0 and transfer.accounts["towers.text"].loaded == 0
    assert "mean is (0.48145466, 0.4578275, 0.40821073) there, (0.5, 0.5, 0.5) here" in table


def test_the_table_accounts_for_every_weight(clip_folder: Path) -> None:
    text = CLIP["text"] | {"stem": WORDS | {"vocab_size": 80}}
    model, transfer = warmed(clip_folder, child({"image": CLIP["image"], "text": text}, embed_dim=10))
    words = transfer.accounts["towers.text"]
    assert words.fresh == 80 * 16 and words.left_over == VOCABULARY * 16
    assert list(words.notes) == ["stem.words.weight is [60, 16] there, [80, 16] here"]
    counted = sum(account.loaded + account.fresh for account in transfer.accounts.values())
    assert counted == sum(tensor.numel() for tensor in model.state_dict().values())
    head, *rows = transfer.table().splitlines()
    assert head.split() == ["part", "loaded", "fresh", "left", "over", "remarks"]
    assert [row.split()[0] for row in rows] == ["logit_scale", *sorted(set(transfer.accounts) - {"logit_scale"})]


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((6, 6), (3, 3)), ((2, 8), (4, 4))])
def test_positions_of_a_grid_are_resampled_as_timm_does(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(old[0] * old[1], 5, generator=torch.Generator().manual_seed(0))
    theirs = resample_abs_pos_embed(positions[None], list(new), list(old), num_prefix_tokens=0)[0]
    torch.testing.assert_close(resample_positions(positions, old, new), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("finetune", [{"towers": {"image": "frozen"}}, {"train": "heads"}, {"lora": {"rank": 2}}])
def test_fresh_weights_that_will_never_learn_are_told(clip_folder: Path, finetune: dict[str, object]) -> None:
    """A patch projection of another size, to which nothing there corresponds."""
    stem = STEM | {"image_size": 32, "patch_size": 16}
    model, transfer = warmed(clip_folder, child(CLIP | {"image": CLIP["image"] | {"stem": stem}}))
    assert transfer.never_learned(model) == {}, "as long as all learn"
    prepare(model, FinetuneConfig.model_validate(finetune))
    assert transfer.never_learned(model) == {"towers.image": 24 * 3 * 16 * 16}


def test_positions_of_words_keep_their_places_when_there_are_fewer() -> None:
    line = torch.arange(8.0).view(8, 1)
    assert torch.equal(resample_positions(line, (8,), (5,)), line[:5])
    longer = resample_positions(line[:4], (4,), (8,))
    assert longer.flatten().tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]


def test_an_image_tower_at_another_size_takes_over_resampled_positions(clip_folder: Path) -> None:
    tower = CLIP["image"] | {"stem": STEM | {"image_size": 32}}
    model, transfer = warmed(clip_folder, child({"image": tower}))
    table = CLIPModel.from_pretrained(clip_folder).vision_model.embeddings.position_embedding.weight.detach()
    theirs = resample_abs_pos_embed(table[None], [4, 4], [2, 2], num_prefix_tokens=1)[0]
    state = model.towers["image"].state_dict()
    ours = torch.cat([state["class_token.position"][None], state["stem.positions.weight"]])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert "positions 2x2 -> 4x4" in transfer.table()


def as_parent(model: MultimodalTransformer) -> Parent:
    return Parent("source", "a model", model.config.parsed_model().towers, model.state_dict())


@pytest.mark.parametrize("positions", ["factorised", "learned"])
def test_a_clip_of_one_repeated_frame_is_to_a_video_tower_what_the_image_was(positions: str) -> None:
    image = TOWER | {"width": 24, "stem": STEM | {"bias": True}}
    source = child({"image": image})
    stem = {"kind": "tubes", "frames": 4, "tube_frames": 2, "image_size": 16, "patch_size": 8, "positions": positions}
    video = child({"video": TOWER | {"width": 24, "stem": stem}})
    transfer = take_over(video, as_parent(source))
    assert transfer.accounts["towers.video"].fresh == 0
    clip = pictures()[:, None].expand(-1, 4, -1, -1, -1)
    with torch.no_grad():
        tokens = source.towers["image"].stem(pictures())
        tubes = video.towers["video"].stem(clip)
        torch.testing.assert_close(tubes, tokens.repeat(1, 2, 1), atol=1e-5, rtol=0)
        # Twice the same tokens leave attention as it was, so that the whole tower answers alike.
        torch.testing.assert_close(video.embed("video", clip), source.embed("image", pictures()), atol=1e-5, rtol=0)


def test_an_inflated_kernel_is_a_third_dimension_of_the_convolution() -> None:
    kernel, frame = torch.randn(5, 3 * 4, dtype=torch.float64), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    flat = torch.nn.functional.conv2d(frame, kernel.view(5, 3, 2, 2)).flatten()
    deep = torch.nn.functional.conv3d(
        frame[:, :, None].expand(-1, -1, 4, -1, -1), inflate_kernel(kernel, 3, 4).view(5, 3, 4, 2, 2)
    )
    torch.testing.assert_close(deep.flatten(), flat, atol=1e-12, rtol=0)


def test_frames_go_through_the_image_tower_that_was_there() -> None:
    image = TOWER | {"width": 24, "stem": STEM}
    source = child({"image": image})
    frames = {"kind": "frames", "image": image, "frames": 2, "depth": 1, "heads": 2}
    video = child({"video": frames})
    transfer = take_over(video, as_parent(source))
    inner = video.towers["video"].image.state_dict()
    assert all(torch.equal(inner[name], tensor) for name, tensor in source.towers["image"].state_dict().items())
    assert transfer.accounts["towers.video"].fresh > 0


@pytest.mark.parametrize("name", ["finetune-classify", "finetune-retrieval"])
def test_the_demos_towers_go_whole_into_the_configs_that_go_on_from_it(name: str) -> None:
    demo, run = (load_run_config(configs_folder() / f"{one}.yaml") for one in ("demo", name))
    words = TokenizerFacts(demo.data.tokenizer.train_vocab_size, pad_id=0, eos_id=1)
    source, model = (MultimodalTransformer.create(resolve(one.model, words), {}) for one in (demo, run))
    accounts = take_over(model, as_parent(source)).accounts
    assert [accounts[f"towers.{tower}"].fresh for tower in run.model.towers] == [0] * len(run.model.towers)


@pytest.mark.parametrize("kind", ["factorised", "learned", "frames"])
def test_a_shorter_clip_spreads_its_positions_over_the_same_time(kind: str) -> None:
    """Eight times whose positions count up become four between them, wherever a tower keeps them."""
    image = TOWER | {"width": 24, "stem": STEM}
    stem = STEM | {"kind": "tubes", "tube_frames": 1, "positions": kind}

    def clip(frames: int) -> MultimodalTransformer:
        if kind == "frames":
            return child({"video": {"kind": "frames", "image": image, "frames": frames, "depth": 1, "heads": 2}})
        return child({"video": TOWER | {"width": 24, "stem": stem | {"frames": frames}}})

    name = {"factorised": "stem.positions.time", "learned": "stem.positions.weight", "frames": "positions.weight"}[kind]
    longer, shorter = clip(8), clip(4)
    weight = longer.towers["video"].get_parameter(name)
    with torch.no_grad():
        weight.copy_(torch.arange(8.0).repeat_interleave(len(weight) // 8)[:, None].expand_as(weight))
    transfer = take_over(shorter, as_parent(longer))
    found = shorter.towers["video"].get_parameter(name)
    assert found.unflatten(0, (4, -1))[:, 0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert "positions 8" in transfer.table()


def test_heads_of_the_same_name_are_taken_over_and_others_left_fresh() -> None:
    source = build_model({"itc": InfoNCEConfig()})
    with torch.no_grad():
        source.objectives["itc"].logit_scale.log.fill_(3.0)
    same, other = build_model({"itc": InfoNCEConfig()}), build_model({"contrast": InfoNCEConfig()})
    take_over(same, as_parent(source))
    transfer = take_over(other, as_parent(source))
    assert same.objectives["itc"].logit_scale.log.item() == 3.0
    assert transfer.accounts["objectives.contrast"].fresh == transfer.accounts["objectives.itc"].left_over == 1
