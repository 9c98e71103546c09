"""Tokenizers in the Hugging Face format, trained from the texts of shards.

Enter: shards. Leave: a folder that `AutoTokenizer.from_pretrained` reads; and of any tokenizer what a text tower must
know of it. Refused: shards without captions, a vocabulary too small for all bytes.

Ours is byte-level BPE on lower-cased text. `<pad>` is 0, and `<eos>` has the largest id, because CLIP and open_clip
pool a text at its largest id.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.collection import Contents, survey
from data_pipeline.config import CacheConfig
from data_pipeline.holdings import in_words
from data_pipeline.index import load_or_build_index
from data_pipeline.order import CHUNK_SAMPLES, locate
from data_pipeline.remote import RemoteFile, RemoteShard, Shard
from data_pipeline.shards import find_shards
from data_pipeline.tar import open_shard
from mmpretrain.core.captions import CAPTION_EXTENSIONS, texts_of
from mmpretrain.core.errors import ConfigError, DataError, SampleError
from mmpretrain.core.types import TokenizerFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, MASK, BEGIN, END = "<pad>", "<unk>", "<mask>", "<bos>", "<eos>"
SMALLEST = len(pre_tokenizers.ByteLevel.alphabet()) + 5
MAX_SAMPLES = 1_000_000
"""Captions of so many samples, spread evenly over the shards, are enough for a vocabulary."""
MAX_REMOTE_CHUNKS = 64
"""From object stores whole chunks are fetched, since captions lie among the media; so many are enough as well."""


def train_tokenizer(
    shards: Iterable[str | Path],
    vocab_size: int,
    out_dir: Path,
    keys: Sequence[str | None] = (None,),
    max_samples: int = MAX_SAMPLES,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 - frozen
) -> Path:
    """Train on the shards' texts and save in `out_dir`, which appears whole; the same texts give the same files.

    `keys` tell where the texts stand, as for `core.captions.texts_of`; null: the captions. Fewer words than
    `vocab_size` come out where the texts do not hold so many.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"train_vocab_size {vocab_size} is too small; bytes and special tokens alone take {SMALLEST}")
    if out_dir.exists():
        raise ConfigError(f"{out_dir} already holds something; load it by data.tokenizer.path, or delete it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[PAD, UNKNOWN, MASK, BEGIN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found = find_shards(map(str, shards), cache)
    texts = _texts(found.shards, survey(found.shards, found.collections), keys, max_samples)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        pair=f"{BEGIN} $A {END} $B:1 {END}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
    )
    return _save(tokenizer, out_dir)


def tokenizer_facts(tokenizer: "PreTrainedTokenizerFast") -> TokenizerFacts:
    """What a text tower must know; a separator token (BERT) counts as the end where there is no other."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return TokenizerFacts(
        vocab_size=len(tokenizer),
        pad_id=tokenizer.pad_token_id,
        eos_id=end,
        mask_id=tokenizer.mask_token_id,
        special_ids=tuple(sorted(tokenizer.all_special_ids)),
        ends_texts=end in tokenizer("a")["input_ids"],
    )


def _texts(
    shards: Sequence[Shard], contents: Sequence[Contents], keys: Sequence[str | None], max_samples: int
) -> Iterator[str]:
    """Texts of at most `max_samples` samples at even distances; samples whose texts cannot be read have none."""
    found = False
    for members in _members(shards, [one.num_samples for one in contents], max_samples):
        try:
            texts = [text for key in keys for text in texts_of(members, key)]
        except SampleError:
            continue
        found |= bool(texts)
        yield from texts
    if not found:
        extensions = {name for one in contents for kind in one.kinds for name in kind.extensions}
        raise DataError(
            f"the {len(shards)} shards hold no captions to train a tokenizer from, but "
            f"{in_words(extensions)}; name shards with .txt members, or one to load by data.tokenizer.path"
        )


def _members(shards: Sequence[Shard], counts: Sequence[int], max_samples: int) -> Iterator[dict[str, bytes]]:
    """The members that may hold texts, of samples at even distances."""
    first, stride = 0, max(1, -(-sum(counts) // max_samples))
    remote = [(shard, count) for shard, count in zip(shards, counts, strict=True) if isinstance(shard, RemoteShard)]
    for shard, count in zip(shards, counts, strict=True):
        if not isinstance(shard, RemoteShard):
            yield from _local_members(shard, range(-first % stride, count, stride))
        first += count
    yield from _remote_members(remote)


def _local_members(shard: Path, ordinals: range) -> Iterator[dict[str, bytes]]:
    index = load_or_build_index(shard)
    with open_shard(shard) as data:
        for ordinal in ordinals:
            offset, _ = index.sample_range(ordinal)
            yield {
                name: bytes(data[offset + begin : offset + begin + size])
                for name, begin, size in index.members(ordinal)
                if name in CAPTION_EXTENSIONS
            }


def _remote_members(shards: Sequence[tuple[RemoteShard, int]]) -> Iterator[dict[str, bytes]]:
    """Of some chunks at even distances."""
    ends = np.cumsum([count for _, count in shards], dtype=np.int64)
    total = int(ends[-1]) if shards else 0
    step = CHUNK_SAMPLES * max(1, -(-total // (CHUNK_SAMPLES * MAX_REMOTE_CHUNKS)))
    for start in range(0, total, step):
        numbers, ordinals = locate(np.arange(start, min(start + CHUNK_SAMPLES, total)), ends)
        for number in np.unique(numbers).tolist():
            shard, count = shards[number]
            index = load_or_build_index(shard)
            file = RemoteFile(shard, index, int(ends[number]) - count)
            for ordinal in ordinals[numbers == number].tolist():
                with suppress(SampleError):
                    yield index.slice_members(ordinal, file.read(ordinal))


def _save(tokenizer: Tokenizer, out_dir: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, mask_token=MASK, bos_token=BEGIN, eos_token=END
    )
    unfinished = out_dir.with_name(f".{out_dir.name}.{uuid4().hex}")
    unfinished.mkdir(parents=True)
    wrapped.save_pretrained(unfinished)
    return unfinished.rename(out_dir)
