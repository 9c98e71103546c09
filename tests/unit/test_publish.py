"""A published folder: complete, verified, and in place only when everything held."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_export import VOCABULARY, clip_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from mmpretrain.publishing.card import Contents, render_card
from mmpretrain.publishing.facts import ParentFacts, PublishError, PublishFacts, SourceFacts
from mmpretrain.publishing.folder import Published, check_sums, publish_model
from mmpretrain.publishing.verify import verify

FACTS = PublishFacts(
    name="shapes-tiny",
    license="apache-2.0",
    steps=600,
    samples_seen=76_800,
    run_config={"precision": "bf16", "seed": 3, "optimizer": {"kind": "adamw", "lr": 0.001}},
    sources=(SourceFacts("shapes", num_shards=4, num_samples=4000, digest="9f2c", license="cc0-1.0"),),
    evaluations={"val/i2t_r@1": 0.8125, "val/i2t_chance_r@1": 0.0039},
    evaluated_at_step=600,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer of the model's vocabulary, whose end token has the largest id; it would pad on the left."""
    words = ["<pad>", "<unk>", "<mask>", "<bos>", "a", "red", "blue", "square", "circle"]
    words += [f"w{number}" for number in range(VOCABULARY - len(words) - 1)] + ["<eos>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<bos>", 3), ("<eos>", VOCABULARY - 1)]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask", "bos", "eos")}
    folder = tmp_path_factory.mktemp("tokenizer")
    sides = {"padding_side": "left", "truncation_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **sides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Published:
    """A small pair in CLIP's layout, published once for all tests."""
    return publish_model(clip_model(), tmp_path_factory.mktemp("out") / "model", FACTS, tokenizer)


def test_every_layout_that_fits_was_verified(published: Published) -> None:
    assert list(published.results) == ["mmpretrain", "clip", "open_clip"]
    for found in published.results.values():
        assert found is not None
        assert set(found) == {"image", "text"}
        assert max(found.values()) < 1e-5
    assert published.obstacles["siglip"][0] == "towers.image.pooling is 'class', the layout needs 'map'"


def test_the_folder_holds_all_a_user_needs_and_no_pickle(published: Published) -> None:
    names = {path.relative_to(published.folder).as_posix() for path in published.folder.rglob("*") if path.is_file()}
    own = {"model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", "probe.safetensors"}
    record = {"README.md", "provenance.json", "SHA256SUMS", "training_config.yaml"}
    examples = {"usage.py", "usage_clip.py", "usage_open_clip.py"}
    clip = {"clip/model.safetensors", "clip/tokenizer.json", "clip/config.json"}
    open_clip = {
        f"open_clip/{name}" for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json")
    }
    assert own | record | examples | clip | open_clip <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert [path.name for path in published.folder.parent.iterdir()] == ["model"]


def test_the_card_gives_the_recorded_facts(published: Published) -> None:
    text = (published.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["model-index"][0]["results"][0]["metrics"][1] == {"type": "val/i2t_r@1", "value": 0.8125}
    for line in (
        "| `val/i2t_r@1` | 0.8125 |",
        "| optimizer | kind adamw, lr 0.001 |",
        "| shapes | 4 | 4,000 | cc0-1.0 | `9f2c` |",
        "| itc | infonce | 1.0 |",
        "600 steps, 76,800 samples",
        "towers.image.pooling is 'class', the layout needs 'map'",
        'folder = Path(__file__).parent / "clip"',
    ):
        assert line in text
    record = json.loads((published.folder / "provenance.json").read_text())
    assert record["verification"]["clip"]["image"] < 1e-5
    assert record["samples_seen"] == 76_800


def test_the_card_of_a_fine_tuned_model_names_its_parent() -> None:
    contents = Contents({"towers": {}}, {}, 7, {}, {}, {}, {})
    parent = ParentFacts("openai/clip-vit-base-patch32", "CLIPModel", "4be1")
    text = render_card(dataclasses.replace(FACTS, parent=parent), contents)
    assert "Fine-tuned from openai/clip-vit-base-patch32 (CLIPModel, weights `4be1`) with mmpretrain for 600" in text


def test_a_user_of_transformers_gets_the_answers_of_the_model(published: Published) -> None:
    processor = CLIPProcessor.from_pretrained(published.folder / "clip")
    ids = processor(text=["a red square"], padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[3, 4, 5, 7, VOCABULARY - 1, 0, 0, 0, 0]]
    words = AutoTokenizer.from_pretrained(published.folder)(["a red square"], padding="max_length")
    theirs = CLIPModel.from_pretrained(published.folder / "clip").get_text_features(input_ids=ids).pooler_output
    ours = clip_model().embed("text", ids, torch.tensor(words["attention_mask"]).bool())
    torch.testing.assert_close(theirs / theirs.norm(dim=1), ours, rtol=0, atol=1e-5)


def test_a_layout_whose_tokenizer_reads_otherwise_is_found(published: Published, tmp_path: Path) -> None:
    copy = shutil.copytree(published.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("usage*", "open_clip"))
    assert set(verify(copy)) == {"mmpretrain", "clip"}
    settings = copy / "clip" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"right"', '"left"'))
    with pytest.raises(PublishError, match="clip: its tokenizer gives other ids than the trained model's"):
        verify(copy)


def test_checksums_find_a_changed_and_an_added_file(published: Published, tmp_path: Path) -> None:
    check_sums(published.folder)
    lines = (published.folder / "SHA256SUMS").read_text()
    (tmp_path / "SHA256SUMS").write_text("".join(line for line in lines.splitlines(True) if "usage.py" in line))
    (tmp_path / "usage.py").write_text("changed")
    (tmp_path / "extra.txt").write_text("new")
    with pytest.raises(PublishError, match=r"\['extra.txt', 'usage.py'\] differ from SHA256SUMS"):
        check_sums(tmp_path)


def test_a_copy_that_answers_differently_leaves_nothing_behind(tmp_path: Path, tokenizer: Path) -> None:
    model = clip_model()
    model.towers["image"].norm.register_forward_hook(lambda _module, _inputs, tokens: tokens * 1.1 + 0.1)
    with pytest.raises(PublishError, match="mmpretrain: embeddings differ from the trained model's"):
        publish_model(model, tmp_path / "model", FACTS, tokenizer)
    assert list(tmp_path.iterdir()) == []


def replaced(**changes: str) -> PublishFacts:
    return PublishFacts(**{**FACTS.__dict__, **changes})


def test_a_missing_license_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="no license was given; name one the Hub knows"):
        publish_model(clip_model(), tmp_path / "model", replaced(license=""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["Trained by {author}", "TODO: say more", "[More Information Needed]", "<your text>"])
def test_an_unfilled_placeholder_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PublishError, match="the description still holds the placeholder"):
        publish_model(clip_model(), tmp_path / "model", replaced(description=text))


def test_a_target_that_holds_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(PublishError, match="already holds something"):
        publish_model(clip_model(), tmp_path, FACTS)
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_card_says_what_was_not_verified() -> None:
    config = clip_model().config
    contents = Contents(config.model, config.objectives, 1, {"open_clip": []}, {"open_clip": None}, {}, {})
    assert "not verified: the library was not installed" in render_card(FACTS, contents)
