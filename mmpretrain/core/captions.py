"""Where the captions of a sample stand among its members; packing, indexing, decoding and evaluation all ask here.

Enter: the members of a sample. Leave: its captions, first one first. Refused, as a SampleError: text that is not UTF-8,
JSON that is not an object, captions that are not text.

`.json` with a list `captions` comes first (what `data pack` writes); then `.txt`, one caption whatever its lines
(img2dataset, open_clip); then a `caption` in `.json`. Other text of a sample (a question, captions of its video) stands
in `.json` under a key of its own.
"""

import json
from collections.abc import Mapping

from mmpretrain.core.errors import SampleError

TEXT_EXTENSION = "txt"
METADATA_EXTENSION = "json"
CAPTION_EXTENSIONS = frozenset({TEXT_EXTENSION, METADATA_EXTENSION})


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
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError("the captions in .json are not a list of text")
    return [caption.strip() for caption in captions if caption.strip()]


def texts_of(members: Mapping[str, bytes], key: str | None) -> list[str]:
    """The texts under a key of `.json`, one or a list, that are not blank; null: the captions."""
    if key is None:
        return captions_of(members)
    found = _metadata(members[METADATA_EXTENSION]).get(key) if METADATA_EXTENSION in members else None
    texts = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(text, str) for text in texts):
        raise SampleError(f"what .json holds under {key!r} is neither text nor a list of text")
    return [text.strip() for text in texts if text.strip()]


def _metadata(raw: bytes) -> dict[str, object]:
    try:
        metadata = json.loads(_decode(raw, METADATA_EXTENSION))
    except json.JSONDecodeError as error:
        raise SampleError(f"the .json member is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise SampleError(f"the .json member holds a {type(metadata).__name__}, not an object")
    return metadata


def _decode(raw: bytes, extension: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"the .{extension} member is not UTF-8: {error}") from error
