"""Where the captions of a sample stand, in our shards and in those of others."""

import pytest

from mmpretrain.core.captions import captions_of, texts_of
from mmpretrain.core.errors import SampleError


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"json": b'{"captions": ["a", " b "]}', "txt": b"a"}, ["a", "b"]),
        ({"json": b'{"caption": "a", "url": "x"}', "txt": b"two\nlines"}, ["two\nlines"]),
        ({"json": b'{"caption": "a"}'}, ["a"]),
        ({"json": b'{"caption": null}', "jpg": b""}, []),
        ({"txt": b"  \n"}, []),
        ({"jpg": b""}, []),
    ],
)
def test_captions_come_from_json_lists_then_text_then_json(members: dict[str, bytes], captions: list[str]) -> None:
    assert captions_of(members) == captions


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"txt": b"\xff"}, r"the \.txt member is not UTF-8"),
        ({"json": b"{", "txt": b"a"}, r"the \.json member is not JSON"),
        ({"json": b"[]"}, r"the \.json member holds a list, not an object"),
        ({"json": b'{"captions": "a"}'}, r"the captions in \.json are not a list of text"),
        ({"json": b'{"caption": 3}'}, r"the captions in \.json are not a list of text"),
    ],
)
def test_captions_that_cannot_be_read_are_told(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        captions_of(members)


def test_other_texts_stand_under_keys_of_json() -> None:
    members = {"json": b'{"captions": ["a"], "question": " why ", "answers": ["x", "", "y"], "count": 3}', "txt": b"a"}
    assert texts_of(members, None) == ["a"]
    assert texts_of(members, "question") == ["why"]
    assert texts_of(members, "answers") == ["x", "y"]
    assert texts_of(members, "other") == texts_of({"txt": b"a"}, "question") == []
    with pytest.raises(SampleError, match="what .json holds under 'count' is neither text nor a list of text"):
        texts_of(members, "count")
