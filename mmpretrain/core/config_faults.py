"""pydantic's errors as lines a person can act on: file, line, key, what was seen, what is expected, the near miss.

Enter: a config class, the tree of nodes it was validated from, pydantic's error list. Leave: `Fault`s.
"""

import difflib
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mmpretrain.core.yaml_source import Fault, Key, Node, describe

BROKEN_RULES = "broken_rules"
"""Error type of rules that span fields; its context holds ((path, message), ...)."""

_EXPECTED = {
    "model_type": "a map of keys",
    "model_attributes_type": "a map of keys",
    "dict_type": "a map of keys",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "bool_type": "true or false",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text (in quotes where it looks like a number)",
}


@dataclass(frozen=True)
class _Spot:
    """Where an error stands: its path without union tags, the map that holds it, the type expected there."""

    path: tuple[Key, ...]
    owner: object
    here: object


def translate(model: type[BaseModel], root: Node, errors: Iterable[ErrorDetails]) -> list[Fault]:
    """One fault per error and broken rule; the alternatives of one value are joined by "or"."""
    faults: list[Fault] = []
    expected: dict[tuple[Key, ...], list[str]] = {}
    for error in errors:
        spot = _walk(model, error["loc"])
        if error["type"] == BROKEN_RULES:
            faults += [_fault(root, (*spot.path, *path), message) for path, message in error["ctx"]["rules"]]
        elif (message := _structural(model, spot, error)) is not None:
            faults.append(_fault(root, spot.path, message))
        else:
            expected.setdefault(spot.path, []).append(_expectation(error))
    for path, wanted in expected.items():
        faults.append(_fault(root, path, _unexpected(root.nearest(path), wanted)))
    return faults


def _fault(root: Node, path: tuple[Key, ...], message: str) -> Fault:
    return Fault(root.nearest(path).place, path, message)


def _structural(model: type[BaseModel], spot: _Spot, error: ErrorDetails) -> str | None:
    """The message of a fault in the shape of the tree; None where a value is at fault."""
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(model, spot)
        case "missing":
            wanted, key = _type_name(spot.here), spot.path[-1]
            if isinstance(key, int):
                return f"the list ends too early; add a {wanted}"
            return f"is missing; it has no default, add `{key}: <{wanted}>`"
        case "union_tag_not_found":
            return f"has no `kind`; expected one of {', '.join(sorted(_kinds(spot.here)))}"
        case "union_tag_invalid":
            seen, known = str(error["ctx"]["tag"]), sorted(_kinds(spot.here))
            return f"saw kind {seen!r}, expected {_any_of(known)}{_near(seen, known)}"
        case "value_error" | "assertion_error":
            return str(error["ctx"]["error"])
    return None


def _expectation(error: ErrorDetails) -> str:
    if error["type"] in ("too_long", "too_short"):
        bound, limit = ("at most", "max_length") if error["type"] == "too_long" else ("at least", "min_length")
        return f"{bound} {error['ctx'][limit]} of them, not {error['ctx']['actual_length']}"
    message = error["msg"].removeprefix("Input should be ")
    return _EXPECTED.get(error["type"], message[0].lower() + message[1:])


def _unexpected(node: Node, wanted: Sequence[str]) -> str:
    seen = node.plain()
    shown = f"a {describe(seen)}" if isinstance(seen, dict | list) else f"{seen!r} ({describe(seen)})"
    choices = [choice for text in wanted for choice in text.replace(" or ", ", ").split(", ")]
    literals = [choice.strip("'") for choice in choices if choice.startswith("'")]
    return f"saw {shown}, expected {' or '.join(dict.fromkeys(wanted))}{_near(str(seen), literals)}"


def _unknown_key(model: type[BaseModel], spot: _Spot) -> str:
    known = _fields(spot.owner)
    key = str(spot.path[-1])
    near = _near(key, known)
    if near:
        return f"unknown key{near}"
    elsewhere = [path for path in _all_keys(model) if path.split(".")[-1] == key]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; expected one of {', '.join(known)}"


def _near(seen: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(seen, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _any_of(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else names[0]


def _walk(model: type[BaseModel], location: Sequence[Key]) -> _Spot:
    """Follow a pydantic location through the annotations and drop the union tags in it."""
    path: list[Key] = []
    owner: object = None
    here: object = model
    for key in location:
        if members := _members(here):
            here = _member(members, str(key))
        elif key != "[key]":
            owner, here = here, _bare(_child(here, key))
            path.append(key)
    return _Spot(tuple(path), owner, here)


def _bare(annotation: object) -> object:
    """The type beneath Annotated and Optional."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _members(annotation: object) -> list[object]:
    """The alternatives of a union, None left out; nothing for other types."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return []
    return [_bare(arg) for arg in get_args(annotation) if arg is not type(None)]


def _member(members: Sequence[object], tag: str) -> object:
    """The alternative a tag in a location names: a config class by its `kind`; others hold no further keys."""
    for member in members:
        config = _config_class(member)
        if config is not None and tag in (config.__name__, *_kinds(config)):
            return config
    return object


def _child(annotation: object, key: Key) -> object:
    """The annotation of what stands at a key of a config class, map, list or tuple."""
    config = _config_class(annotation)
    if config is not None:
        field = config.model_fields.get(str(key))
        return object if field is None else field.annotation
    arguments = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    if get_origin(annotation) is tuple and isinstance(key, int) and key < len(arguments):
        return arguments[key]
    return arguments[-1] if arguments else object


def _config_class(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _fields(annotation: object) -> list[str]:
    config = _config_class(annotation)
    return [] if config is None else list(config.model_fields)


def _kinds(annotation: object) -> list[str]:
    """The values `kind` may have in a config class or a union of them."""
    kinds: list[str] = []
    for member in _members(annotation) or [annotation]:
        config = _config_class(member)
        if config is not None and "kind" in config.model_fields:
            kinds += map(str, get_args(config.model_fields["kind"].annotation))
    return kinds


def _all_keys(model: type[BaseModel]) -> list[str]:
    """Dotted paths of all keys in config classes below, maps and unions left out."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        found.append(name)
        below = _config_class(_bare(field.annotation))
        if below is not None:
            found += [f"{name}.{path}" for path in _all_keys(below)]
    return found


def _type_name(annotation: object) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if _config_class(annotation) is not None or get_origin(annotation) is dict or _members(annotation):
        return "map"
    names: dict[object, str] = {int: "integer", float: "number", bool: "true or false", str: "text"}
    return names.get(annotation, "list" if get_origin(annotation) in (list, tuple) else "value")
