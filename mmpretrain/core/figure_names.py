"""Names of figures that are about two modalities, as evaluation gives them and pages read them.

Enter: names of modalities. Leave: "i2t" for from an image to its texts; the four usual modalities by their letter, any
other in full.
"""

_LETTERS = {"image": "i", "text": "t", "video": "v", "audio": "a"}
_NAMES = {letter: name for name, letter in _LETTERS.items()}


def way_of(query: str, gallery: str) -> str:
    """The short name of finding a `gallery` item for a `query`."""
    return f"{_LETTERS.get(query, query)}2{_LETTERS.get(gallery, gallery)}"


def modalities_of(way: str) -> tuple[str, str]:
    """The modalities of a short name: query, then gallery."""
    query, _, gallery = way.partition("2")
    return _NAMES.get(query, query), _NAMES.get(gallery, gallery)
