"""Native towers against transformers' CLIP and SigLIP, residual ones against torchvision's ResNet, weights and all."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torchvision.models import resnet18
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.native import NativeTowerConfig
from mmpretrain.objectives.mlm import MLMConfig

WIDTH, DEPTH, HEADS, VOCABULARY, LENGTH, SIZE, PATCH, EOS = 32, 2, 2, 50, 9, 16, 4, 49
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 64}
TEXT = SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
VISION = SIZES | {"image_size": SIZE, "patch_size": PATCH}
WORDS = {"kind": "embeddings", "context_length": LENGTH, "vocab_size": VOCABULARY, "eos_id": EOS}
HALF = (0.5, 0.5, 0.5)
PATCHES = {"kind": "patches", "image_size": SIZE, "patch_size": PATCH, "mean": HALF, "std": HALF}
TOKENIZER = TokenizerFacts(VOCABULARY, pad_id=0, eos_id=EOS, mask_id=3, special_ids=(0, 3, EOS))


def native(**options):
    sizes = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_ratio": 2.0}
    return NativeTowerConfig.model_validate(sizes | options)


def pixels(rows=3):
    torch.manual_seed(1)
    return torch.randint(0, 256, (rows, 3, SIZE, SIZE), dtype=torch.uint8)


def normalised(images):
    return (images / 255 - 0.5) / 0.5


def ids():
    torch.manual_seed(2)
    tokens = torch.randint(4, EOS, (3, LENGTH))
    for row, end in enumerate((8, 4, 6)):
        tokens[row, end], tokens[row, end + 1 :] = EOS, 0
    return tokens


def randomise(model):
    """Weights of a size at which errors would show; transformers starts norms and biases at one and zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def fused(theirs, part, names):
    return torch.cat([getattr(theirs.self_attn, f"{name}_proj").get_parameter(part) for name in names])


def blocks_from(layers, state):
    for number, theirs in enumerate(layers):
        ours = f"transformer.blocks.{number}"
        for part in ("weight", "bias"):
            state[f"{ours}.attention.in_proj.{part}"] = fused(theirs, part, "qkv")
            for mine, other in {
                "attention.out_proj": theirs.self_attn.out_proj,
                "norm1": theirs.layer_norm1,
                "norm2": theirs.layer_norm2,
                "mlp.fc1": theirs.mlp.fc1,
                "mlp.fc2": theirs.mlp.fc2,
            }.items():
                state[f"{ours}.{mine}.{part}"] = other.get_parameter(part)
    return state


def norm_from(name, theirs):
    return {f"{name}.weight": theirs.weight, f"{name}.bias": theirs.bias}


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_native_image_tower_is_that_of_clip(activation):
    theirs = randomise(CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION | {"hidden_act": activation})))
    vision = theirs.vision_model
    tower = native(stem=PATCHES, pooling="class", pre_norm=True, activation=activation).build("image")
    positions = vision.embeddings.position_embedding.weight
    state = {
        "stem.project.weight": vision.embeddings.patch_embedding.weight.flatten(1),
        "stem.positions.weight": positions[1:],
        "class_token.weight": vision.embeddings.class_embedding,
        "class_token.position": positions[0],
    }
    state |= norm_from("pre_norm", vision.pre_layrnorm) | norm_from("norm", vision.post_layernorm)
    tower.load_state_dict(blocks_from(vision.encoder.layers, state))
    assert_same(tower(pixels())["pooled"], vision(pixel_values=normalised(pixels())).pooler_output)


def test_the_native_text_tower_is_that_of_clip():
    special = {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
    text = randomise(CLIPModel(CLIPConfig(text_config=TEXT | special, vision_config=VISION))).text_model
    tower = native(stem=WORDS, pooling="eos", causal=True, activation="quick_gelu").build("text")
    state = {
        "stem.words.weight": text.embeddings.token_embedding.weight,
        "stem.positions.weight": text.embeddings.position_embedding.weight,
    }
    tower.load_state_dict(blocks_from(text.encoder.layers, state | norm_from("norm", text.final_layer_norm)))
    ours, theirs = tower(ids(), ids() != 0), text(input_ids=ids())
    assert_same(ours["pooled"], theirs.pooler_output)
    assert_same(ours["tokens"], theirs.last_hidden_state)


def siglip():
    return randomise(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)))


def test_the_native_image_tower_is_that_of_siglip():
    vision = siglip().vision_model
    options = {"pooling": "map", "activation": "gelu_tanh", "norm_eps": 1e-6}
    tower = native(stem=PATCHES | {"bias": True}, **options).build("image")
    head = vision.head
    state = {
        "stem.project.weight": vision.embeddings.patch_embedding.weight.flatten(1),
        "stem.project.bias": vision.embeddings.patch_embedding.bias,
        "stem.positions.weight": vision.embeddings.position_embedding.weight,
        "pool.probe.weight": head.probe.flatten(),
    }
    for part in ("weight", "bias"):
        joined = head.attention.get_parameter(f"in_proj_{part}")
        state[f"pool.attention.query.{part}"] = joined[:WIDTH]
        state[f"pool.attention.key_value.{part}"] = joined[WIDTH:]
        state[f"pool.attention.out_proj.{part}"] = head.attention.out_proj.get_parameter(part)
        state[f"pool.mlp.fc1.{part}"] = head.mlp.fc1.get_parameter(part)
        state[f"pool.mlp.fc2.{part}"] = head.mlp.fc2.get_parameter(part)
    state |= norm_from("pool.norm", head.layernorm) | norm_from("norm", vision.post_layernorm)
    tower.load_state_dict(blocks_from(vision.encoder.layers, state))
    ours, theirs = tower(pixels()), vision(pixel_values=normalised(pixels()))
    assert_same(ours["tokens"], theirs.last_hidden_state)
    assert_same(ours["pooled"], theirs.pooler_output)


def test_the_native_text_tower_is_that_of_siglip():
    text = siglip().text_model
    options = {"attend_padding": True, "activation": "gelu_tanh", "norm_eps": 1e-6}
    tower = native(stem=WORDS, pooling="last", **options).build("text")
    state = {
        "stem.words.weight": text.embeddings.token_embedding.weight,
        "stem.positions.weight": text.embeddings.position_embedding.weight,
    }
    tower.load_state_dict(blocks_from(text.encoder.layers, state | norm_from("norm", text.final_layer_norm)))
    # Its pooled output goes through the head, which is our projection.
    ours, theirs = tower(ids(), ids() != 0), text(input_ids=ids())
    assert_same(ours["tokens"], theirs.last_hidden_state)
    assert_same(text.head(ours["pooled"]), theirs.pooler_output)


@pytest.mark.parametrize("pooling", ["class", "mean", "map"])
def test_padding_changes_nothing(pooling):
    tower = native(stem=WORDS, pooling=pooling).build("text")
    mask = ids() != 0
    other = torch.where(mask, ids(), 7)
    torch.testing.assert_close(tower(ids(), mask)["pooled"], tower(other, mask)["pooled"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["class", "mean", "map"])
def test_a_row_of_padding_alone_stays_finite(pooling):
    tower = native(stem=WORDS, pooling=pooling).build("text")
    output = tower(ids(), torch.zeros(3, LENGTH, dtype=torch.bool))
    sum(value.float().sum() for value in output.values()).backward()
    assert all(torch.isfinite(value).all() for value in output.values())
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)


def test_kept_tokens_hold_their_places():
    tower = native(stem=PATCHES, pooling="class").build("image")
    everything = torch.arange(16).repeat(3, 1)
    assert torch.equal(tower(pixels(), keep=everything)["tokens"], tower(pixels())["tokens"])
    changed = pixels()
    changed[:, :, :, 4:] = 0
    first_column = torch.tensor([0, 4, 8, 12]).repeat(3, 1)
    seen = tower(pixels(), keep=first_column)["tokens"]
    assert seen.shape == (3, 1 + 4, WIDTH)
    assert torch.equal(seen, tower(changed, keep=first_column)["tokens"])


def test_words_score_hidden_states_with_their_own_vectors():
    tower = native(stem=WORDS).build("text")
    hidden = torch.randn(4, WIDTH)
    assert torch.equal(tower.vocabulary_logits(hidden), hidden @ tower.stem.words.weight.T)


def test_patches_of_a_tower_are_what_its_stem_projects():
    tower = native(stem=PATCHES).build("image")
    projected = tower.patches(pixels()) @ tower.stem.project.weight.T + tower.stem.positions.weight
    torch.testing.assert_close(projected, tower.stem(pixels()))


def test_a_tower_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match="no word embeddings"):
        native(stem=PATCHES).build("image").vocabulary_logits(torch.zeros(1, WIDTH))
    with pytest.raises(ConfigError, match="use a native tower with a patch stem"):
        native(stem=WORDS).build("text").patches(ids())
    with pytest.raises(ConfigError, match="set stem.eos_id"):
        native(stem=WORDS | {"eos_id": None}, pooling="eos").build("text")
    with pytest.raises(ConfigError, match="set vocab_size"):
        native(stem=WORDS | {"vocab_size": None}).build("text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": PATCHES, "heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"stem": WORDS, "pooling": "class", "causal": True}, "sees no other when causal"),
        ({"stem": PATCHES | {"patch_size": 7}}, "image_size 16 is not a multiple of patch_size 7; use 14"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        native(**options)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="vocab_size 49 of the text stem is smaller than the tokenizer's 50"):
        native(stem=WORDS | {"vocab_size": 49}).resolve("text", TOKENIZER)


def test_a_text_is_read_at_its_end_only_where_the_tokenizer_marks_it():
    endless = replace(TOKENIZER, ends_texts=False)
    with pytest.raises(ConfigError, match="puts no such token behind texts; add one to its post-processor"):
        native(stem=WORDS, pooling="eos").resolve("text", endless)
    assert native(stem=WORDS, pooling="mean").resolve("text", endless).stem.eos_id == EOS


def test_what_a_stem_leaves_open_comes_from_the_tokenizer():
    stem = native(stem={"kind": "embeddings", "eos_id": 7}).resolve("text", TOKENIZER).stem
    assert (stem.vocab_size, stem.eos_id, stem.mask_id, stem.special_ids) == (VOCABULARY, 7, 3, (0, 3, EOS))


def torchvision_model(**options):
    tower = {"kind": "torchvision", "name": "resnet18", "image_size": 64} | options
    return MultimodalTransformer.create(ModelConfig.model_validate({"embed_dim": 8, "towers": {"image": tower}}), {})


def test_a_residual_tower_is_that_of_torchvision_with_its_statistics_frozen(tmp_path):
    torch.manual_seed(0)
    theirs = resnet18()
    theirs(torch.randn(4, 3, 64, 64))
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    theirs.fc = torch.nn.Identity()
    model = torchvision_model(weights=str(tmp_path / "resnet18.pth"), mean=HALF, std=HALF).train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    output = model.towers["image"](images)
    assert output["tokens"].shape == (2, 4, 512)
    torch.testing.assert_close(output["pooled"], theirs.eval()(normalised(images)), atol=1e-4, rtol=1e-4)


def test_a_row_of_a_residual_tower_does_not_depend_on_its_neighbours():
    tower = torchvision_model().train().towers["image"]
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    together, alone = tower(images)["pooled"][:1], tower(images[:1])["pooled"]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_weights_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nor one of IMAGENET1K_V1"):
        torchvision_model(weights="IMAGENET")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="holds no weights of a resnet18"):
        torchvision_model(weights=str(tmp_path / "other.pth"))


def test_a_stem_tower_gives_its_tokens_as_they_are():
    model = MultimodalTransformer.create(
        ModelConfig.model_validate(
            {
                "embed_dim": 8,
                "towers": {
                    "image": {
                        "kind": "stem",
                        "width": 8,
                        "stem": {"kind": "patches", "image_size": 16, "patch_size": 8},
                    },
                    "text": {
                        "kind": "stem",
                        "width": 12,
                        "stem": {"kind": "embeddings", "context_length": LENGTH, "vocab_size": 64, "mask_id": 2},
                    },
                },
                "fusion": {"kind": "early", "width": 8, "depth": 1, "heads": 2, "experts": True},
            }
        ),
        {"mlm": MLMConfig(condition_on=("image",))},
    )
    image, text = model.towers["image"], model.towers["text"]
    tokens, keep, mask = image(pixels())["tokens"], torch.tensor([[3, 1]] * 3), ids() != 0
    assert torch.equal(tokens, image.stem(pixels()))
    assert torch.equal(image(pixels(), keep=keep)["tokens"], tokens[:, [3, 1]])
    words = text(ids(), mask)
    torch.testing.assert_close(words["pooled"][0], words["tokens"][0][mask[0]].mean(0))
    assert (text.facts().vocab_size, text.facts().mask_id, image.facts().num_tokens) == (64, 2, 4)
