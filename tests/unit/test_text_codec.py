"""The text codec against transformers: the same ids, at a fixed length, from any member that holds captions."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmpretrain.core.errors import ConfigError, SampleError
from mmpretrain.core.types import FieldSpec
from mmpretrain.modalities.text import TextCodec, TextCodecConfig

WORDS = ["<pad>", "<bos>", "<mask>", "<unk>", "a", "red", "blue", "square", "<eos>"]
PAD, BOS, UNK, A, RED, BLUE, SQUARE, EOS = 0, 1, 3, 4, 5, 6, 7, 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)
    return str(folder)


def build(tokenizer: str, length: int = 6, caption: str = "random") -> TextCodec:
    return TextCodecConfig(caption=caption).build({"text": FieldSpec((length,), "int64")}, tokenizer)  # type: ignore[arg-type]


def test_ids_are_those_of_transformers(tokenizer: str) -> None:
    texts = ["a red square", "a", "a blue blue blue blue blue blue square", "green"]
    wanted = AutoTokenizer.from_pretrained(tokenizer)(
        texts, padding="max_length", truncation=True, max_length=6, return_tensors="np"
    )
    seen = build(tokenizer).encode(texts)
    assert np.array_equal(seen["text"], wanted["input_ids"]) and seen["text"].dtype == np.int64
    assert np.array_equal(seen["text.mask"], wanted["attention_mask"].astype(bool))


def test_a_text_that_is_cut_still_ends_with_eos(tokenizer: str) -> None:
    seen = build(tokenizer, length=4).encode(["a red blue square"])
    assert seen["text"].tolist() == [[BOS, A, RED, EOS]] and seen["text.mask"].all()


def test_decoding_gives_the_declared_fields(tokenizer: str) -> None:
    codec = build(tokenizer)
    decoded = codec.decode({"jpg": b"", "txt": b"a red square\n"}, None)
    assert decoded["text"].tolist() == [BOS, A, RED, SQUARE, EOS, PAD]
    assert decoded["text.mask"].tolist() == [True] * 5 + [False]
    assert {name: (value.shape, value.dtype.name) for name, value in decoded.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in codec.fields.items()
    }


def test_a_draw_chooses_among_all_captions_and_evaluation_takes_the_first(tokenizer: str) -> None:
    members = {"json": json.dumps({"captions": ["red", "blue", "square"]}).encode(), "txt": b"red"}
    codec = build(tokenizer)
    drawn = {int(codec.decode(members, np.random.default_rng(seed))["text"][1]) for seed in range(30)}
    assert drawn == {RED, BLUE, SQUARE}
    assert codec.decode(members, None)["text"][1] == RED
    assert build(tokenizer, caption="first").decode(members, np.random.default_rng(1))["text"][1] == RED
    assert codec.captions(members) == ["red", "blue", "square"]


def test_a_codec_travels_to_a_worker_without_transformers(tokenizer: str) -> None:
    codec = build(tokenizer)
    content = pickle.dumps(codec)
    assert b"transformers" not in content
    texts = ["a blue square"]
    assert np.array_equal(pickle.loads(content).encode(texts)["text"], codec.encode(texts)["text"])  # noqa: S301


def test_a_sample_without_caption_is_unusable(tokenizer: str) -> None:
    with pytest.raises(SampleError, match=r"no caption \(saw: jpg, json\)"):
        build(tokenizer).decode({"jpg": b"", "json": b"{}"}, None)
    with pytest.raises(SampleError, match="the .txt member is not UTF-8"):
        build(tokenizer).decode({"txt": b"\xff\xfe"}, None)


def test_a_text_under_a_key_fills_a_field_of_its_own(tokenizer: str) -> None:
    config = TextCodecConfig(field="question", key="asked")
    codec = config.codec({"question": FieldSpec((5,), "int64")}, tokenizer)
    members = {"txt": b"a red square", "json": json.dumps({"asked": ["blue square", "red"]}).encode()}
    decoded = codec.decode(members, None)
    assert config.makes == "question" and codec.extensions == {"json"}
    assert decoded["question"].tolist() == [BOS, BLUE, SQUARE, EOS, PAD]
    assert decoded.keys() == {"question", "question.mask", "question.present"} == codec.fields.keys()
    with pytest.raises(SampleError, match=r"no text under 'asked' in .json \(saw: txt\)"):
        codec.decode({"txt": b"a red square"}, None)


def test_tokenizers_that_cannot_serve_are_refused(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer; set data.tokenizer.path"):
        TextCodecConfig().build({"text": FieldSpec((6,), "int64")}, None)
    with pytest.raises(ConfigError, match="context_length 2 leaves no room for words beside 2 special tokens"):
        build(tokenizer, length=2)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(tmp_path / "t")
    with pytest.raises(ConfigError, match="has no pad token"):
        build(str(tmp_path / "t"))
    with pytest.raises(
        ConfigError, match=r"cannot be loaded .*; give a folder that holds a tokenizer.json or a hub name"
    ):
        build(str(tmp_path / "absent"))
