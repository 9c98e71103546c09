"""Which shards a pattern at an object store names: a tar, a range, a glob, a folder, a list of names or a manifest.

Enter: a URL. Leave: `RemoteShard`s, by name where a store is listed, else in the order of the list. Refused: schemes
that no client reads, addresses that carry credentials, lists that lead elsewhere than to an object store.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from data_pipeline.collection import Collection, fetch_collection
from data_pipeline.config import CacheConfig
from data_pipeline.remote import RemoteShard, patience_of
from data_pipeline.stores import SCHEMES, list_folder, read_whole, scheme_of
from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json

_LISTS = (".txt", ".json")
_HOW_TO_LIST = (
    "name a list of its shards (.txt, one a line), a range {000..099}.tar, or publish a collection.index there"
)


def find_remote(url: str, cache: CacheConfig) -> tuple[list[RemoteShard], Mapping[str, Collection]]:
    """The shards of a URL without ranges, and what collections say of their folders."""
    _refuse_address(url)
    folder, _, last = url.rstrip("/").rpartition("/")
    if any(mark in folder for mark in "*?["):
        raise DataError(f"shards {url!r}: only the last part of an address may hold wildcards; name each folder")
    if any(mark in last for mark in "*["):
        return _in_folder(folder, last, cache)
    if last.endswith(_LISTS):
        return _from_list(url, cache), {}
    if last.endswith(".tar"):
        return [RemoteShard(url, cache)], {}
    return _in_folder(url.rstrip("/"), "*.tar", cache)


def _refuse_address(url: str) -> None:
    split = urlsplit(url)
    if scheme_of(url) is None:
        raise DataError(
            f"shards {url!r}: {split.scheme}: is not read; known are {', '.join(f'{s}://' for s in SCHEMES)}"
        )
    if split.username or split.password or split.query or split.fragment:
        shown = f"{split.scheme}://{split.hostname or ''}{split.path}"
        raise DataError(
            f"shards at {shown}: the address carries a user, a query or a fragment, and what opens a store does not "
            f"belong in a config; let the store's client find credentials in the environment"
        )


def _in_folder(folder: str, pattern: str, cache: CacheConfig) -> tuple[list[RemoteShard], Mapping[str, Collection]]:
    collection = fetch_collection(folder, cache)
    if collection is not None:
        versions = {f"{folder}/{name}": contents.version for name, contents in collection.items()}
    else:
        listed = {one.url: one.version for one in list_folder(f"{folder}/", patience_of(cache))}
        versions = {url: listed.get(f"{url}.index", "") for url in listed}
    found = [
        RemoteShard(url, cache, version)
        for url, version in sorted(versions.items())
        if url.endswith(".tar") and fnmatchcase(url.rpartition("/")[2], pattern)
    ]
    if not found:
        raise DataError(f"shards {folder + '/' + pattern!r}: the store lists no such .tar there; {_HOW_TO_LIST}")
    return found, {} if collection is None else {folder: collection}


def _from_list(url: str, cache: CacheConfig) -> list[RemoteShard]:
    content = read_whole(url, patience_of(cache))
    try:
        names = _names_in(content.decode(), url)
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"{url} is no list of shards ({error}); write their names one a line, or as a JSON list"
        ) from error
    found = [RemoteShard(_address(name, url), cache) for name in names]
    if not found:
        raise DataError(f"{url} names no shards")
    return found


def _names_in(text: str, url: str) -> list[str]:
    """The lines of a .txt, or a JSON list, which may stand under `names` as in the manifest of `data pack`."""
    if url.endswith(".txt"):
        lines = (line.strip() for line in text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]
    content = parse_json(text)
    names = content.get("names") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("neither a list of names nor a manifest with `names`")
    return names


def _address(name: str, listed_in: str) -> str:
    """The URL of an entry, which is a URL itself or a path below the list."""
    if "://" in name:
        _refuse_address(name)
        address = name
    else:
        address = f"{listed_in.rpartition('/')[0]}/{name.removeprefix('./')}"
    if name.startswith("/") or ".." in name.split("/") or not address.endswith(".tar"):
        raise DataError(
            f"{listed_in} names {name!r}; a list holds tars below its own folder, or whole addresses of them"
        )
    return address
