"""Changes that make something valid into something hostile: bits, cuts, splices, lying lengths, other JSON.

Enter: bytes or JSON, and a generator of random numbers. Leave: changed bytes or JSON; the same for the same generator.
"""

import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

NUMBERS = (0, 1, -1, 127, 255, 65535, (1 << 31) - 1, -(1 << 31), (1 << 32) - 1, (1 << 63) - 1, -(1 << 63))
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "../../secret",
    "/etc/passwd",
    "\0",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [[[[]]]],
    1.5,
    1e308,
    float("inf"),
    float("nan"),
    10**400,
)
_DIGITS = re.compile(rb"\d+")
Mutation = Callable[[bytearray, random.Random], None]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Content with one to eight changes."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        if changed:
            chance.choice(_MUTATIONS)(changed, chance)
    return bytes(changed)


def _flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _flip_early(content: bytearray, chance: random.Random) -> None:
    """Headers stand at the beginning."""
    content[chance.randrange(min(len(content), 256))] = chance.randrange(256)


def _cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def _remove(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    del content[start : start + chance.choice((1, 4, 64, 512))]


def _splice(content: bytearray, chance: random.Random) -> None:
    """A part of it once more, somewhere else."""
    start, place = chance.randrange(len(content)), chance.randrange(len(content))
    content[place:place] = content[start : start + chance.choice((1, 16, 512, 4096))]


def _lie(content: bytearray, chance: random.Random) -> None:
    """A number of another size where some number may stand."""
    form = chance.choice("<> ").strip() + chance.choice("bhiq")
    size = struct.calcsize(form)
    if len(content) >= size:
        place = chance.randrange(len(content) - size + 1)
        number = chance.choice(NUMBERS) & (1 << 8 * size) - 1
        content[place : place + size] = number.to_bytes(size, "big" if form.startswith(">") else "little")


def _lie_in_digits(content: bytearray, chance: random.Random) -> None:
    """Another number where one is written out."""
    found = list(_DIGITS.finditer(content[: 1 << 16]))
    if found:
        start, end = chance.choice(found).span()
        content[start:end] = str(chance.choice((*NUMBERS, 10**30))).encode()


def _zero(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    length = min(len(content) - start, chance.choice((1, 8, 512)))
    content[start : start + length] = bytes([chance.choice((0, 0xFF))]) * length


_MUTATIONS: tuple[Mutation, ...] = (_flip, _flip_early, _cut, _remove, _splice, _lie, _lie_in_digits, _zero)


def mutated_json(value: Any, chance: random.Random) -> Any:
    """The same JSON with one to four values, keys or items changed."""
    copied = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(copied))
        if places:
            _change(*chance.choice(places), chance)
    return copied


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    if isinstance(value, dict):
        return [(value, key) for key in value] + [place for child in value.values() for place in _places(child)]
    if isinstance(value, list):
        return [(value, n) for n in range(len(value))] + [place for child in value for place in _places(child)]
    return []


def _change(container: Any, key: Any, chance: random.Random) -> None:
    kind = chance.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[str(chance.choice(VALUES[13:19]))] = container.pop(key)
    elif kind == 2 and isinstance(container, list):
        container.append(deepcopy(container[key]))
    else:
        container[key] = deepcopy(chance.choice(VALUES))


def resealed_tar(content: bytes) -> bytes:
    """With the checksum of each block that could be a header made right, so that what was changed is looked at."""
    changed = bytearray(content)
    for start in range(0, len(changed) - 511, 512):
        block = changed[start : start + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    return bytes(changed)


def resealed_header(content: bytes) -> bytes:
    """An index or collection file with the checksum of its header made right."""
    if len(content) < 16:
        return content
    (length,) = struct.unpack_from("<I", content, 8)
    return content[:12] + struct.pack("<I", zlib.crc32(content[16 : 16 + length])) + content[16:]
