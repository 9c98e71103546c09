"""Where the captions of a sample stand among its members; packing, indexing, decoding and evaluation all ask here.

Enter: the members of a sample. Leave: its captions, first one first. Refused, as a SampleError: text that is not UTF-8,
JSON that is not an object, captions that are not text, too long, or hold half a character.

`.json` with a list `captions` comes first (what `data pack` writes); then `.txt`, one caption whatever its lines
(img2dataset, open_clip); then a `caption` in `.json`. Other text of a sample (a question, captions of its video) stands
in `.json` under a key of its own.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from mmpretrain.core.errors import SampleError
from mmpretrain.core.json_text import parse_json

TEXT_EXTENSION = "txt"
METADATA_EXTENSION = "json"
CAPTION_EXTENSIONS = frozenset({TEXT_EXTENSION, METADATA_EXTENSION})
_NOT_CAPTIONS = "the captions in .json are not a list of text"
MAX_CHARACTERS = 1_000_000
"""Of one text: a long book's, which a tokenizer reads in a second."""
MAX_BYTES = 16 << 20
"""Of a member that holds texts."""


def captions_of(members: Mapping[str, bytes]) -> list[str]:
    """All captions of a sample that are not blank; an empty list where it has none."""
    metadata = _metadata(members[METADATA_EXTENSION]) if METADATA_EXTENSION in members else {}
    captions = metadata.get("captions")
    if captions is None and TEXT_EXTENSION in members:
        captions = [_decode(members[TEXT_EXTENSION], TEXT_EXTENSION)]
    if captions is None and metadata.get("caption") is not None:
        captions = [metadata["caption"]]
    if captions is None:
        return []
    if not isinstance(captions, list):
        raise SampleError(_NOT_CAPTIONS)
    return usable_texts(captions, _NOT_CAPTIONS)


def texts_of(members: Mapping[str, bytes], key: str | None) -> list[str]:
    """The texts under a key of `.json`, one or a list, that are not blank; null: the captions."""
    if key is None:
        return captions_of(members)
    found = _metadata(members[METADATA_EXTENSION]).get(key) if METADATA_EXTENSION in members else None
    texts = [] if found is None else found if isinstance(found, list) else [found]
    return usable_texts(texts, f"what .json holds under {key!r} is neither text nor a list of text")


def usable_texts(values: Sequence[object], otherwise: str) -> list[str]:
    """Those that are not blank; SampleError, which says `otherwise`, where some are no text."""
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        raise SampleError(otherwise)
    return [usable_text(text) for text in texts if text.strip()]


def usable_text(text: str) -> str:
    """The text without blanks around it; SampleError where no tokenizer could or should read it."""
    if len(text) > MAX_CHARACTERS:
        raise SampleError(f"a text has {len(text)} characters, more than {MAX_CHARACTERS}; cut it into several")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"a text is no Unicode: it holds half of a character at {error.start}") from error
    return text.strip()


@lru_cache(1)  # several codecs look for their texts in one member
def _metadata(raw: bytes) -> Mapping[str, object]:
    try:
        metadata = parse_json(_decode(raw, METADATA_EXTENSION))
    except ValueError as error:
        raise SampleError(f"the .json member is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise SampleError(f"the .json member holds a {type(metadata).__name__}, not an object")
    return metadata


def _decode(raw: bytes, extension: str) -> str:
    if len(raw) > MAX_BYTES:
        raise SampleError(f"the .{extension} member holds {len(raw)} bytes of text, more than {MAX_BYTES}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the .{extension} member is not UTF-8: {error}") from error
