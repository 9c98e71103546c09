"""Objects on S3, GCS, HTTP and the hub, read and written by clients inside this process, never by a shell.

Enter: URLs, and how patient to be. Leave: bytes, sizes, listings and copies. Refused, as a DataError: what is not there
or not allowed, at once; what stays away or comes back damaged, after a bounded number of attempts.

Credentials come from where each client looks for them (environment, its own files), never from a config.
"""

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.core import url_to_fs

from mmpretrain.core.containers import require
from mmpretrain.core.errors import DataError

ResultT = TypeVar("ResultT")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429})
"""Answers that refuse a request for now; other 4xx stay."""


@dataclass(frozen=True)
class _Scheme:
    """What reads one kind of URL."""

    module: str
    extra: str
    faults: tuple[str, ...]
    """Exceptions of its client that are no OSError."""


_AIOHTTP = "aiohttp.ClientError"
_GCS = _Scheme("gcsfs", "gcs", (_AIOHTTP, "gcsfs.retry.HttpError", "google.auth.exceptions.GoogleAuthError"))
_HTTP = _Scheme("aiohttp", "http", (_AIOHTTP,))
SCHEMES = {
    "s3": _Scheme("s3fs", "s3", (_AIOHTTP, "botocore.exceptions.BotoCoreError", "botocore.exceptions.ClientError")),
    "gs": _GCS,
    "gcs": _GCS,
    "http": _HTTP,
    "https": _HTTP,
    "hf": _Scheme("huggingface_hub", "hub", ("huggingface_hub.errors.HTTPError",)),
}


@dataclass(frozen=True)
class Patience:
    """How long a store that does not answer is asked again."""

    attempts: int
    timeout_s: float
    """Of one attempt."""
    advice: str = "then start again, or raise data.cache.attempts"
    """What else to do once all were in vain."""


@dataclass(frozen=True)
class Listed:
    """One object of a folder."""

    url: str
    version: str
    """Changes with its content where the store tells; else empty."""


class AbsentObject(DataError):
    """The store answers, and holds no such thing."""


class DamagedContent(DataError):
    """All bytes came back, and every time some of them were wrong."""

    def __init__(self, message: str, content: bytes) -> None:
        super().__init__(message)
        self.content = content

    def __reduce__(self) -> tuple[type["DamagedContent"], tuple[str, bytes]]:
        """So that a worker can hand it on."""
        return DamagedContent, (str(self), self.content)


class _Garbled(Exception):
    """One attempt gave other bytes than it should have."""

    def __init__(self, message: str, content: bytes | None = None) -> None:
        super().__init__(message)
        self.content = content


def scheme_of(name: str) -> str | None:
    """The scheme of a URL that a store reads; None for anything else."""
    scheme = urlsplit(name).scheme.lower()
    return scheme if scheme in SCHEMES else None


def read_range(
    url: str, start: int, length: int, patience: Patience, fault: Callable[[bytes], str | None] | None = None
) -> bytes:
    """These bytes; `fault` says what is wrong with them, and they are then fetched again."""

    def attempt() -> bytes:
        content: bytes = _run(
            url,
            patience,
            lambda store, path: store.cat_file(path, start=start, end=start + length),
            lambda store, path: store._cat_file(path, start=start, end=start + length),
        )
        if len(content) != length:
            ignored = ", so the server gives no ranges" if len(content) > length else ""
            raise _Garbled(f"{len(content)} bytes came for the {length} from byte {start} on{ignored}")
        return _sound(content, fault)

    return _patiently(url, patience, attempt)


def read_whole(url: str, patience: Patience, fault: Callable[[bytes], str | None] | None = None) -> bytes:
    """A small object; one that is not there raises AbsentObject."""

    def attempt() -> bytes:
        content: bytes = _run(
            url, patience, lambda store, path: store.cat_file(path), lambda store, path: store._cat_file(path)
        )
        return _sound(content, fault)

    return _patiently(url, patience, attempt)


def size_of(url: str, patience: Patience) -> int:
    """Bytes of an object."""

    def attempt() -> int:
        told: dict[str, int | None] = _run(
            url, patience, lambda store, path: store.info(path), lambda store, path: store._info(path)
        )
        size = told["size"]
        if size is None:
            raise DataError(f"{url}: the server does not say how long it is; publish an index beside it")
        return size

    return _patiently(url, patience, attempt)


def list_folder(url: str, patience: Patience) -> list[Listed]:
    """The objects right below a folder, by name."""
    return _entries(url, "file", patience)


def list_subfolders(url: str, patience: Patience) -> list[Listed]:
    """The folders right below a folder, by name; none where it is not there."""
    try:
        return _entries(url, "directory", patience)
    except AbsentObject:
        return []


def _entries(url: str, kind: str, patience: Patience) -> list[Listed]:
    def attempt() -> list[Listed]:
        found: list[dict[str, object]] = _run(
            url,
            patience,
            lambda store, path: store.ls(path, detail=True),
            lambda store, path: store._ls(path, detail=True),
        )
        store, _ = url_to_fs(url)
        listed = [
            Listed(store.unstrip_protocol(entry["name"]), _version(entry)) for entry in found if entry["type"] == kind
        ]
        return sorted(listed, key=lambda one: one.url)

    return _patiently(url, patience, attempt)


def read_file(url: str, path: Path, patience: Patience) -> None:
    """Copy an object into a file; whether its bytes are the right ones is for others to say."""
    _patiently(
        url,
        patience,
        lambda: _run(
            url,
            patience,
            lambda store, source: store.get_file(source, str(path)),
            lambda store, source: store._get_file(source, str(path)),
        ),
    )


def write_file(path: Path, url: str, patience: Patience) -> None:
    """Copy a file to an object, in place of one that is there."""
    size = path.stat().st_size

    def attempt() -> None:
        _run(
            url,
            patience,
            lambda store, target: store.put_file(str(path), target),
            lambda store, target: store._put_file(str(path), target),
        )
        arrived = size_of(url, patience)
        if arrived != size:
            raise _Garbled(f"{arrived} bytes arrived of {size}")

    _patiently(url, patience, attempt)


def remove(url: str, patience: Patience) -> None:
    """Delete an object; nothing happens where there is none."""
    try:
        _patiently(
            url,
            patience,
            lambda: _run(
                url,
                patience,
                lambda store, path: store.rm_file(path),
                lambda store, path: store._rm_file(path),
            ),
        )
    except AbsentObject:
        return


def check_client(url: str) -> None:
    """Refuse a URL whose client is not installed."""
    _faults_of(url)


def _sound(content: bytes, fault: Callable[[bytes], str | None] | None) -> bytes:
    what = fault(content) if fault is not None else None
    if what is not None:
        raise _Garbled(what, content)
    return content


def _version(entry: dict[str, object]) -> str:
    told = (entry.get(name) for name in ("ETag", "md5Hash", "blob_id", "LastModified", "updated"))
    return next((str(value) for value in told if value), "")


def _patiently(url: str, patience: Patience, attempt: Callable[[], ResultT]) -> ResultT:
    """The result of the first attempt that succeeds."""
    fault: Exception
    faults: tuple[type[Exception], ...] = (OSError, _Garbled, *_faults_of(url))
    begin = time.monotonic()
    for number in range(patience.attempts):
        if number:
            _pause(number)
        try:
            return attempt()
        except FileNotFoundError as error:
            if _hides_another(error):
                fault = error
                continue
            raise AbsentObject(f"{url} does not exist; check the address, and that it was uploaded") from error
        except faults as error:
            if isinstance(error, PermissionError) or _is_final(error):
                raise DataError(f"{url} is refused ({_reason(error)}); check the credentials of its store") from error
            fault = error
    seconds = time.monotonic() - begin
    message = (
        f"{url}: gave up after {patience.attempts} attempts in {seconds:.1f} s, the last: {_reason(fault)}; check the "
        f"network and the store, {patience.advice}"
    )
    if isinstance(fault, _Garbled) and fault.content is not None:
        raise DamagedContent(message, fault.content)
    raise DataError(message) from fault


def _pause(number: int) -> None:
    """Twice as long each time, and up to half of it by chance, so that clients do not come back together."""
    time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (number - 1)) * random.uniform(0.5, 1.0))


def _run(
    url: str,
    patience: Patience,
    plain: Callable[[AbstractFileSystem, str], ResultT],
    interruptible: Callable[[AbstractFileSystem, str], Awaitable[ResultT]],
) -> ResultT:
    """One request, ended after the time limit; a client that cannot be interrupted has a limit of its own."""
    store, path = url_to_fs(url)
    if not store.async_impl:
        return plain(store, path)
    result: ResultT = sync(store.loop, interruptible, store, path, timeout=patience.timeout_s)
    return result


def _faults_of(url: str) -> tuple[type[Exception], ...]:
    scheme = scheme_of(url)
    assert scheme is not None, url
    return _load(scheme)


@cache
def _load(scheme: str) -> tuple[type[Exception], ...]:
    """What the client of a scheme raises; refuses a scheme whose client is not installed."""
    known = SCHEMES[scheme]
    require(known.module, known.extra, f"the store of {scheme}:// URLs")
    return tuple(_named(fault) for fault in known.faults)


def _named(dotted: str) -> type[Exception]:
    module, _, name = dotted.rpartition(".")
    found: type[Exception] = vars(import_module(module))[name]
    return found


def _is_final(error: Exception) -> bool:
    """Whether an HTTP answer says that asking again is in vain."""
    try:
        from aiohttp import ClientResponseError
    except ImportError:
        return False
    return (
        isinstance(error, ClientResponseError) and 400 <= error.status < 500 and error.status not in _WORTH_ANOTHER_TRY
    )


def _hides_another(error: FileNotFoundError) -> bool:
    """fsspec's HTTP client says of a server that does not answer that the file is not there."""
    try:
        from aiohttp import ClientError
    except ImportError:
        return False
    cause = error.__cause__
    return (
        isinstance(cause, ClientError | OSError) and not isinstance(cause, FileNotFoundError) and not _is_final(cause)
    )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, _Garbled) else f"{type(error).__name__}{': ' if text else ''}{text}"
