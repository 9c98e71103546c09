"""Strict configuration: YAML files with their line numbers, defaults, overrides, and every fault at once.

Enter: a config class, a run file and `key=value` overrides. Leave: a frozen, validated tree.
Refuses unknown keys, wrong types and broken rules, each with file, line and a suggestion.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mmpretrain.core.config_faults import BROKEN_RULES, translate
from mmpretrain.core.yaml_source import (
    FLOAT_RESOLVER,
    Key,
    Node,
    merge,
    read_overrides,
    read_text,
    read_with_defaults,
    refuse,
)

ConfigT = TypeVar("ConfigT", bound="Config")

Rule = tuple[tuple[Key, ...], str]
"""A broken rule: path of the key at fault, relative to the config, and a message that names the fix."""


class Config(BaseModel):
    """Base of every config class: frozen, unknown keys refused, numbers and booleans never mixed up."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    def broken_rules(self) -> Iterable[Rule]:
        """Rules that span fields and do not hold here; subclasses override this."""
        return ()

    @model_validator(mode="after")
    def _refuse_broken_rules(self) -> Self:
        rules = tuple(self.broken_rules())
        if rules:
            lines = "; ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in rules)
            raise PydanticCustomError(BROKEN_RULES, "{lines}", {"lines": lines, "rules": rules})
        return self


def load_config(
    model: type[ConfigT], path: Path, overrides: Sequence[str] = (), folders: Sequence[Path] = ()
) -> ConfigT:
    """Read a run file upon its defaults, apply overrides, validate; `folders` are further homes of defaults."""
    return validate(model, merge(read_with_defaults(path, folders), read_overrides(overrides)))


def parse_config(model: type[ConfigT], text: str, name: str) -> ConfigT:
    """A config from one YAML document without defaults, such as `dump_yaml` writes; `name` stands in faults."""
    return validate(model, read_text(text, name))


def validate(model: type[ConfigT], root: Node) -> ConfigT:
    """The config that a tree of nodes describes, or every fault of it at once."""
    # JSON strictness: text is no number, 1 is no boolean, but a list may become a tuple and text a path.
    document = json.dumps(root.plain())
    try:
        return model.model_validate_json(document, strict=True)
    except ValidationError as error:
        faults = translate(model, root, error.errors(include_url=False, include_input=False))
    refuse(faults)
    raise AssertionError("pydantic refused without a reason")


class _Dumper(yaml.SafeDumper):
    """Quotes text that either our reader or another YAML reader would take for a number."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _one_line(dumper: _Dumper, items: list[object]) -> yaml.Node:
    """Lists of plain values stand on one line."""
    flow = not any(isinstance(item, list | dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_implicit_resolver(*FLOAT_RESOLVER)
_Dumper.add_representer(list, _one_line)


def dump_yaml(config: Config) -> str:
    """The config as YAML, every default written out; `parse_config` reads it back equal."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def config_hash(config: Config, exclude: Collection[str] = ()) -> str:
    """Sixteen hex digits that change with any field but those of the top level in `exclude`."""
    fields = config.model_dump(mode="json", exclude=set(exclude))
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
