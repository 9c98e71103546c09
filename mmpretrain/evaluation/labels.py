"""A value from a sample's .json member, as text. Refused: no such member, no such key, text that is not JSON."""

from collections.abc import Mapping

from mmpretrain.core.errors import DataError
from mmpretrain.core.json_text import parse_json


def json_label(members: Mapping[str, bytes], key: str, sample: str) -> str:
    """The value under `key` of the sample's .json member."""
    if "json" not in members:
        raise DataError(
            f"sample {sample} has no .json member to read {key!r} from (members: {sorted(members)}); "
            "pack the shards with metadata, or leave this evaluation out"
        )
    try:
        record = parse_json(members["json"])
    except ValueError as error:
        raise DataError(f"the .json member of sample {sample} is not JSON: {error}") from error
    if not isinstance(record, dict) or key not in record:
        known = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"the .json member of sample {sample} has no key {key!r}; it has {known}")
    return str(record[key])
