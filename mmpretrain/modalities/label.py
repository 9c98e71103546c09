"""Labels: what a supervised objective is taught, read from a sample's metadata.

Enter: a `.json` member with the label under a key, or a `.cls` member (webdataset's: a whole number, or a class name).
Leave: the class number, one mark per tag, or the values. Refused: samples whose label is no such thing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, JsonValue

from mmpretrain.core.errors import AbsentError, ConfigError, SampleError
from mmpretrain.core.json_text import parse_json
from mmpretrain.core.types import Array, FieldSpec
from mmpretrain.modalities.base import CodecConfig

_JSON, _CLASS = "json", "cls"


class LabelCodecConfig(CodecConfig):
    """Where a label stands; how many classes, tags or values there are is told by the objective that reads it."""

    kind: Literal["label"] = "label"
    field: str = Field("label", min_length=1)
    """Batch field it fills; the codec stands under this name."""
    key: str = Field("label", min_length=1)
    """Key in the .json member; a sample without it may have a .cls member instead."""
    classes: tuple[str, ...] | None = None
    """Names in the order of their numbers, for labels that are names; null: labels are numbers from 0."""

    @property
    def makes(self) -> str:
        return self.field

    def build(self, inputs: Mapping[str, FieldSpec], tokenizer: str | None) -> "LabelCodec":
        spec = inputs[self.field]
        outputs = spec.below if not spec.shape else spec.shape[0]
        if self.classes is not None and outputs != len(self.classes):
            raise ConfigError(
                f"the codec of label {self.field!r} names {len(self.classes)} classes and its objective has "
                f"{outputs} outputs; make them equal"
            )
        return LabelCodec(self.field, self.key, self.classes, spec)


@dataclass(frozen=True)
class LabelCodec:
    """By the field it is to fill: one class number (int64 []), n tags (bool [n]) or n values (float32 [n])."""

    field: str
    key: str
    classes: tuple[str, ...] | None
    spec: FieldSpec

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {self.field: self.spec}

    @property
    def extensions(self) -> frozenset[str]:
        return frozenset({_JSON, _CLASS})

    def decode(self, members: Mapping[str, bytes], draw: np.random.Generator | None) -> dict[str, Array]:
        found = self._find(members)
        if found is None:
            raise AbsentError(
                f"no label: neither key {self.key!r} in .json nor a .cls member (saw: {', '.join(members)})"
            )
        return {self.field: self._array(found)}

    def _find(self, members: Mapping[str, bytes]) -> JsonValue:
        """The label as it stands in the sample, None where it has none."""
        try:
            if _JSON in members:
                metadata = parse_json(members[_JSON])
                if isinstance(metadata, dict) and metadata.get(self.key) is not None:
                    found: JsonValue = metadata[self.key]
                    return found
            if _CLASS not in members:
                return None
            text = members[_CLASS].decode().strip()
            return int(text) if text.isascii() and text.isdigit() else text
        except ValueError as error:
            raise SampleError(f"the label cannot be read: {error}") from error

    def _array(self, label: JsonValue) -> Array:
        if not self.spec.shape:
            return np.array(self._number(label), self.spec.dtype)
        if self.spec.dtype == "bool":
            return self._marks(label if isinstance(label, list) else [label])
        values = label if isinstance(label, list) else [label]
        if len(values) != self.spec.shape[0] or not all(_is_number(value) for value in values):
            raise SampleError(f"label {label!r} is not {self.spec.shape[0]} numbers")
        try:
            with np.errstate(over="ignore"):
                array = np.array(values, self.spec.dtype)
        except OverflowError as error:
            raise SampleError(f"the label is too large: {error}") from error
        if not np.isfinite(array).all():
            raise SampleError(f"label {label!r} is not finite")
        return array

    def _marks(self, labels: Sequence[JsonValue]) -> Array:
        """True at every tag the sample has."""
        marks = np.zeros(self.spec.shape, np.bool_)
        for label in labels:
            marks[self._number(label)] = True
        return marks

    def _number(self, label: JsonValue) -> int:
        if self.classes is not None:
            if label not in self.classes:
                raise SampleError(f"label {label!r} is none of {', '.join(self.classes[:12])}")
            return self.classes.index(str(label))
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise SampleError(f"label {label!r} is not a class number from 0; name the codec's classes to use names")
        outputs = self.spec.below if not self.spec.shape else self.spec.shape[0]
        if outputs is not None and label >= outputs:
            raise SampleError(f"label {label} is none of the {outputs} classes, which count from 0")
        return label


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
