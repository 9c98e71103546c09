"""The cheap facts of a sample: what its headers and captions tell without decoding it.

Enter: the members of a sample. Leave: `SampleFacts`, with 0 where the sample has no such thing or it cannot be read;
the reader counts such a sample when it meets it, so nothing is refused here.
"""

from collections.abc import Mapping
from typing import NamedTuple

from mmpretrain.core.captions import captions_of
from mmpretrain.core.errors import SampleError
from mmpretrain.core.image_bytes import opened_image
from mmpretrain.core.media_types import IMAGE_EXTENSIONS


class SampleFacts(NamedTuple):
    width: int
    height: int
    captions: int
    characters: int


def facts_of(members: Mapping[str, bytes]) -> SampleFacts:
    width, height = _image_size(members)
    try:
        captions = captions_of(members)
    except SampleError:
        captions = []
    return SampleFacts(width, height, len(captions), max(map(len, captions), default=0))


def _image_size(members: Mapping[str, bytes]) -> tuple[int, int]:
    for extension, content in members.items():
        if extension in IMAGE_EXTENSIONS:
            try:
                with opened_image(content) as image:
                    return image.size
            except SampleError:
                return 0, 0
    return 0, 0
