"""How a published model's inputs are made: its codecs, saved beside its weights.

Enter: the codec configs of a run. Leave: `processor.json`, and the configs read back. Sizes, sampling rate and mel
parameters stand in the model's own config, words in its tokenizer. Refused: a folder without the file, a codec that
this version does not know.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from mmpretrain.core.errors import CheckpointError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.registry import discover
from mmpretrain.modalities.base import CodecConfig

FILE = "processor.json"


def write_codecs(codecs: Mapping[str, CodecConfig], folder: Path) -> None:
    """Save the codecs by the batch field they make."""
    record = {"codecs": {name: codec.model_dump(mode="json") for name, codec in sorted(codecs.items())}}
    (folder / FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_codecs(folder: Path) -> dict[str, CodecConfig]:
    """The codecs of a published folder."""
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}, which tells how its inputs are made; publish the run again with this version"
        )
    kinds = discover("mmpretrain.modalities", CodecConfig)
    try:
        saved = parse_json(path.read_text(encoding="utf-8"))["codecs"]
        codecs = {name: kinds[fields["kind"]].model_validate(fields) for name, fields in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{path} does not describe codecs that this version knows: {error!r}") from error
    for name, codec in codecs.items():
        if codec.makes != name:
            raise CheckpointError(f"{path} has a codec of {codec.makes!r} under {name!r}; publish the run again")
    return codecs
