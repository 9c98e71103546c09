"""Tokenizers trained from shards load in transformers, put `<eos>` last, and are the same every time."""

import json
from pathlib import Path

import pytest
import webdataset
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.config import SourceConfig
from data_pipeline.tokenizer import tokenizer_facts, train_tokenizer
from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.core.errors import ConfigError, DataError
from mmpretrain.core.fast_tokenizer import load_tokenizer
from mmpretrain.core.types import TokenizerFacts
from mmpretrain.training.run_folder import RunFolder
from mmpretrain.training.text import prepare_tokenizer

CAPTIONS = [f"A {colour} {thing}, photographed." for colour in ("red", "blue") for thing in ("dog", "boat", "house")]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "s.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, caption in enumerate(CAPTIONS):
            captions = [caption, f"zebra number {number}"]
            writer.write({"__key__": str(number), "txt": caption, "json": json.dumps({"captions": captions}).encode()})
        writer.write({"__key__": "odd", "txt": "x", "json": b"not json"})
    return path


@pytest.fixture(scope="module")
def folder(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([shard], 300, tmp_path_factory.mktemp("trained") / "tokenizer")


def test_transformers_loads_it_with_the_end_token_last(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token_id == 299 == max(tokenizer.get_vocab().values())
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id, tokenizer.bos_token_id) == (
        0,
        1,
        2,
        3,
    )
    ids = tokenizer("A RED Dog")["input_ids"]
    assert (ids[0], ids[-1]) == (3, 299)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red dog"
    cut = tokenizer("a red dog and a blue boat", truncation=True, max_length=5)["input_ids"]
    assert (len(cut), cut[-1]) == (5, 299)


def test_any_text_round_trips_through_bytes(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in ("größe", "日本語 😀", "tab\there", "<b>"):
        ids = tokenizer(text)["input_ids"]
        assert 1 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ") == text


def test_all_captions_of_a_sample_are_learnt_from(folder: Path) -> None:
    assert len(load_tokenizer(folder)("zebra number")["input_ids"]) == 4


def test_training_again_gives_the_same_files(shard: Path, folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer([shard], 300, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_limit_takes_samples_at_even_distances_over_the_shards(shard: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    with webdataset.TarWriter(str(other)) as writer:
        for number in range(7):
            writer.write({"__key__": str(number), "txt": "quokka " * 3 if number == 6 else "words"})
    trained = load_tokenizer(train_tokenizer([shard, other], 300, tmp_path / "t", max_samples=4))
    assert len(trained("quokka")["input_ids"]) > 3  # samples 0, 4, 8 and 12 of 14; the quokka is 13
    trained = load_tokenizer(train_tokenizer([shard, other], 300, tmp_path / "u", max_samples=14))
    assert len(trained("quokka")["input_ids"]) == 3


def test_the_facts_are_those_of_the_tokenizer(folder: Path) -> None:
    assert tokenizer_facts(load_tokenizer(folder)) == TokenizerFacts(
        vocab_size=300, pad_id=0, eos_id=299, mask_id=2, special_ids=(0, 1, 2, 3, 299)
    )


def test_a_run_keeps_its_words_once_a_checkpoint_knows_them(shard: Path, tmp_path: Path) -> None:
    run, folder = load_run_config(configs_folder() / "flickr1k.yaml"), RunFolder(tmp_path)
    train = run.data.train.model_copy(update={"sources": {"main": SourceConfig(shards=[str(shard)])}})

    def words(size: int) -> int:
        tokenizer = run.data.tokenizer.model_copy(update={"train_vocab_size": size})
        data = run.data.model_copy(update={"train": train, "tokenizer": tokenizer})
        facts = prepare_tokenizer(run.model_copy(update={"data": data}), folder)[1]
        assert facts is not None
        return facts.vocab_size

    assert (words(300), words(290)) == (300, 290)
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert words(300) == 290


def test_a_tokenizer_may_know_an_end_and_put_it_behind_no_text(tmp_path: Path) -> None:
    """As GPT-2's does."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "<eos>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(tmp_path)
    facts = tokenizer_facts(load_tokenizer(tmp_path))
    assert (facts.eos_id, facts.ends_texts) == (2, False)


def test_what_cannot_be_trained_is_refused(shard: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_vocab_size 100 is too small; bytes and special tokens alone take 261"):
        train_tokenizer([shard], 100, tmp_path / "t")
    with pytest.raises(ConfigError, match="already holds something; load it by data.tokenizer.path"):
        train_tokenizer([shard], 300, folder)
    silent = tmp_path / "silent.tar"
    with webdataset.TarWriter(str(silent)) as writer:
        writer.write({"__key__": "a", "jpg": b""})
    with pytest.raises(DataError, match="the 1 shards hold no captions to train a tokenizer from"):
        train_tokenizer([silent], 300, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_tokenizer_that_cannot_serve_is_refused(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer '.*nothing' cannot be loaded .*; give a folder that holds a"):
        load_tokenizer(tmp_path / "nothing")
    folder = train_tokenizer([shard], 300, tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has no pad token, which texts of a fixed length need; add one"):
        load_tokenizer(folder)


def test_it_is_trained_from_the_texts_of_all_keys(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for number in range(9):
            described = {"captions": ["plain words"], "asked": ["quizzical"], "odd": 3}
            writer.write({"__key__": str(number), "json": json.dumps(described).encode()})
    for keys, words in (((None,), 0), ((None, "asked"), 1)):
        tokenizer = load_tokenizer(train_tokenizer([tmp_path / "s.tar"], 300, tmp_path / str(words), keys))
        assert (len(tokenizer.tokenize("quizzical")) == 1) is bool(words)
