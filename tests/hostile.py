"""Builders of what an attacker would hand over: tars by raw headers, pictures and sounds by hand, files that lie.

Enter: contents. Leave: bytes, or files below a folder of the test. Each is made from something valid and one lie.
"""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmpretrain.cli import main

PICTURE = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0\x90wS\xde"
    b"\0\0\0\x0cIDATx\x9cc\xf8\xcf\xc0\0\0\x03\x01\x01\0\xc9\xfe\x92\xef\0\0\0\0IEND\xaeB`\x82"
)
DEEP = "[" * 100_000
HUGE_NUMBER = "1" * 5000
HALF_CHARACTER = '"\\ud800"'


def exit_code(*arguments: object) -> int:
    """Of the command line in this process; anything but its own exit passes through."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def header(name: bytes, size: bytes = b"00000000000\0", kind: bytes = b"0") -> bytes:
    """One block of ustar with its checksum, fields as they are given."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157] = b"0000644\0", size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def about_next(kind: bytes, content: bytes) -> bytes:
    """A header about the member behind it, with its content."""
    return header(b"././@Header", b"%011o\0" % len(content), kind) + content + bytes(-len(content) % 512)


def pax_record(name: str, value: str) -> bytes:
    """`<length> <name>=<value>`, the length counting itself."""
    body = f" {name}={value}\n".encode()
    length = len(body) + len(str(len(body) + 1))
    length = len(body) + len(str(length))
    return str(length).encode() + body


def sample(begin: bytes = b"", name: bytes = b"a.txt", size: bytes = b"00000000000\0") -> bytes:
    """A tar of one empty member behind `begin`."""
    return begin + header(name, size) + bytes(1024)


def told_otherwise(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON header of an index or collection file, and make its checksum right again."""
    content = path.read_bytes()
    magic, length, _ = struct.unpack_from("<8sII", content)
    told = json.loads(content[16 : 16 + length])
    change(told)
    write_header(path, magic, json.dumps(told).encode(), content[16 + length :])


def write_header(path: Path, magic: bytes, text: bytes, body: bytes) -> None:
    text += b" " * (-(16 + len(text)) % 64)
    path.write_bytes(struct.pack("<8sII", magic, len(text), zlib.crc32(text)) + text + body)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"\0\0\0\0") -> bytes:
    """A PNG whose header says what it likes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def wav(rate: int = 16_000, channels: int = 1, bits: int = 16, data: bytes = bytes(2000), size: int = -1) -> bytes:
    """A WAV of these figures."""
    size = len(data) if size < 0 else size
    per_second, block = rate * channels * bits // 8 & 0xFFFFFFFF, channels * bits // 8 & 0xFFFF
    form = struct.pack("<HHIIHH", 1, channels, rate, per_second, block, bits)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", len(head) + size & 0xFFFFFFFF) + head + data


def flac(rate: int, samples: int) -> bytes:
    """The header of a FLAC that promises so many samples."""
    figures = struct.pack(">Q", rate << 44 | 15 << 36 | samples)
    return b"fLaC\x80\0\0\x22" + struct.pack(">HH", 4096, 4096) + bytes(6) + figures + bytes(16)
