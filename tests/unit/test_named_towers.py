"""Towers of images and texts around transformers' own models, found by a folder's name, against the library."""

import json

import pytest
import torch
from test_towers import (
    EOS,
    HALF,
    HEADS,
    LENGTH,
    TEXT,
    TOKENIZER,
    VISION,
    VOCABULARY,
    WIDTH,
    assert_same,
    ids,
    normalised,
    pixels,
    randomise,
)
from transformers import (
    AutoModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from mmpretrain.core.errors import ConfigError
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.towers.hf_auto import HFAutoTowerConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of four architectures, saved as transformers saves them."""
    special = {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
    models = {
        "clip": CLIPModel(CLIPConfig(text_config=TEXT | special, vision_config=VISION)),
        "siglip": SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "bert": BertModel(BertConfig(**TEXT)),
        "vit": ViTModel(ViTConfig(**VISION)),
    }
    root = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        randomise(model).save_pretrained(root / name)
        if name != "bert":
            statistics = {"image_mean": HALF, "image_std": HALF}
            (root / name / "preprocessor_config.json").write_text(json.dumps(statistics))
    return root


def hf_model(folders, image, text, **options):
    config = {
        "embed_dim": 8,
        "towers": {
            "image": {"kind": "hf_auto", "name": str(folders / image)} | options,
            "text": {"kind": "hf_auto", "name": str(folders / text), "context_length": LENGTH} | options,
        },
    }
    return MultimodalTransformer.create(resolve(ModelConfig.model_validate(config), TOKENIZER), {})


@pytest.mark.parametrize(("image", "text"), [("clip", "clip"), ("siglip", "siglip"), ("vit", "bert")])
def test_a_named_tower_computes_what_its_library_computes(folders, image, text):
    model = hf_model(folders, image, text, pooling="pooler")
    theirs = {name: AutoModel.from_pretrained(folders / name).eval() for name in (image, text)}
    vision = theirs[image] if image == "vit" else theirs[image].vision_model
    words = theirs[text] if text == "bert" else theirs[text].text_model
    mask = ids() != 0
    seen = model.towers["image"](pixels())["pooled"], model.towers["text"](ids(), mask)["pooled"]
    assert_same(seen[0], vision(pixel_values=normalised(pixels())).pooler_output)
    assert_same(seen[1], words(input_ids=ids(), attention_mask=mask.long()).pooler_output)


def test_of_an_encoder_with_a_decoder_the_encoder_reads(tmp_path):
    """T5 has no table of positions; this BART scales its words."""
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "max_position_embeddings": LENGTH, "encoder_ffn_dim": 64}
    scaled = BartModel(BartConfig(**heads, **sizes, encoder_layers=1, decoder_layers=1, scale_embedding=True))
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1}
    distant = T5Model(T5Config(**sizes, num_heads=HEADS))
    mask = ids() != 0
    for model in (scaled, distant):
        randomise(model).save_pretrained(tmp_path)
        tower = HFAutoTowerConfig(name=str(tmp_path), context_length=LENGTH, pooling="mean").build("text").eval()
        tower.load_pretrained()
        expected = model.eval().get_encoder()(input_ids=ids(), attention_mask=mask.long()).last_hidden_state
        assert_same(tower(ids(), mask)["tokens"][mask], expected[mask])


def test_a_named_tower_lives_on_without_the_folder_it_came_from(folders, tmp_path):
    moved = tmp_path / "elsewhere"
    (folders / "siglip").rename(moved)
    try:
        model = hf_model(tmp_path, "elsewhere", "elsewhere", pooling="mean")
    finally:
        moved.rename(folders / "siglip")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    mask = ids() != 0
    assert torch.equal(model.embed("image", pixels()), again.embed("image", pixels()))
    assert torch.equal(model.embed("text", ids(), mask), again.embed("text", ids(), mask))


def test_a_named_tower_has_no_dropout_and_ties_its_words(folders):
    tower = hf_model(folders, "vit", "bert").train().towers["text"]
    first, second = (tower(ids(), ids() != 0)["tokens"] for _ in range(2))
    assert torch.equal(first, second)
    hidden, words = torch.randn(2, WIDTH), tower.model.get_input_embeddings().weight
    assert torch.equal(tower.vocabulary_logits(hidden), hidden @ words.T)


def test_named_towers_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"neither a folder with a config\.json nor a reachable hub name"):
        hf_model(tmp_path, "absent", "absent")
    with pytest.raises(ConfigError, match="context_length 10 is longer than the 9 positions"):
        hf_model(folders, "clip", "clip", context_length=10)
    with pytest.raises(
        ConfigError, match="sees none of the words behind it; set the tower's pooling to mean or pooler"
    ):
        HFAutoTowerConfig(name=str(folders / "clip"), context_length=LENGTH).build("text")
    with pytest.raises(ConfigError, match="cannot leave tokens out"):
        hf_model(folders, "vit", "bert").towers["image"](pixels(), keep=torch.zeros(3, 1, dtype=torch.int64))
    (tmp_path / "vit").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "vit" / name).write_bytes((folders / "vit" / name).read_bytes())
    with pytest.raises(ConfigError, match="set the tower's mean and std"):
        ModelConfig.model_validate({"towers": {"image": {"kind": "hf_auto", "name": str(tmp_path / "vit")}}}).towers[
            "image"
        ].resolve("image", None)


@pytest.mark.parametrize(("text", "causal"), [("clip", True), ("siglip", False), ("bert", False)])
def test_a_named_tower_knows_whether_its_words_see_later_ones(folders, text, causal):
    before = torch.random.get_rng_state()
    tower = HFAutoTowerConfig(name=str(folders / text), context_length=LENGTH, pooling="mean")
    tower = tower.resolve("text", TOKENIZER)
    assert tower.build("text").facts().causal is causal
    torch.random.set_rng_state(before)
    with torch.device("meta"):
        assert tower.build("text").facts().causal is causal
    assert torch.equal(torch.random.get_rng_state(), before)
