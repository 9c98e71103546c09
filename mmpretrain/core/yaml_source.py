"""YAML read with the place of every value, so that a fault can name its file and line.

Enter: a file, its `defaults:`, and `key=value` overrides. Leave: one merged tree of `Node`s.
Refuses duplicate keys, tags of other languages, endless aliases and text that is not YAML, all faults at once; and, by
bounds that no config comes near, what would take all memory or time: size, depth, aliases that unfold without end.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from mmpretrain.core.errors import ConfigError

Plain = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None
Key = str | int

_STANDARD = "tag:yaml.org,2002:"
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_SCALAR_PATTERNS = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    "float": (
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
        list("-+.0123456789"),
    ),
}
"""YAML 1.2's core schema: unlike PyYAML's 1.1, `1e-4` is a number, `yes` is text and so is `12:30`."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""After aliases are unfolded: nine lines of nine aliases each would make a billion."""

FLOAT_RESOLVER = (_STANDARD + "float", *_SCALAR_PATTERNS["float"])
"""What PyYAML's own classes lack to know `1e-4` as a number."""


@dataclass(frozen=True)
class Place:
    """Where a value was written: "file:line", or the override as it was typed."""

    text: str
    override: str | None = None
    """The dotted key of the override that this is."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, with its place; `str` is the line the user reads."""

    place: Place
    path: tuple[Key, ...]
    message: str

    def __str__(self) -> str:
        key = ".".join(map(str, self.path))
        named = not key or key == self.place.override
        return f"{self.place.text}: {self.message}" if named else f"{self.place.text}: {key}: {self.message}"


@dataclass(frozen=True)
class Node:
    """A value with its place; maps and lists hold further nodes."""

    value: bool | int | float | str | list["Node"] | dict[str, "Node"] | None
    place: Place

    def plain(self) -> Plain:
        """The value alone, without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def nearest(self, path: Sequence[Key]) -> "Node":
        """The node at a path, or its closest ancestor that was written down."""
        node = self
        for key in path:
            if isinstance(node.value, dict) and key in node.value:
                node = node.value[str(key)]
            elif isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
            else:
                break
        return node


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, (_pattern, _first) in _SCALAR_PATTERNS.items():
    _Loader.add_implicit_resolver(_STANDARD + _tag, _pattern, _first)


def refuse(faults: Sequence[Fault]) -> None:
    """Raise every fault at once, if there are any."""
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(map(str, faults))))


def read_file(path: Path) -> Node:
    """The map in a YAML file."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: holds more than {MAX_BYTES} bytes, which no config does")
    root = read_text(text, str(path))
    if not isinstance(root.value, dict):
        seen = "nothing" if root.value is None else f"a {describe(root.plain())}"
        raise ConfigError(f"{root.place.text}: saw {seen}, expected a map of `key: value` lines")
    return root


def read_text(text: str, name: str) -> Node:
    """One YAML document; `name` stands for the file in faults."""
    try:
        tree = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise ConfigError(f"{name}:{line}: is not YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deep") from None
    if tree is None:
        return Node(None, Place(f"{name}:1"))
    reader = _TreeReader(name)
    root = reader.read(tree, ())
    refuse(reader.faults)
    return root


class _TreeReader:
    """Turns PyYAML's tree into `Node`s and collects what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.faults: list[Fault] = []
        self._open: set[int] = set()
        self._count = 0

    def read(self, tree: yaml.Node, path: tuple[Key, ...]) -> Node:
        place = Place(f"{self.name}:{tree.start_mark.line + 1}")
        if id(tree) in self._open:
            return self._fault(place, path, "an alias to a map or list that holds it has no end")
        self._count += 1
        if self._count > MAX_VALUES:
            raise ConfigError(f"{place.text}: aliases unfold to more than {MAX_VALUES} values, which no config has")
        if len(path) > MAX_DEPTH:
            return self._fault(place, path[:1], f"is nested too deep: more than {MAX_DEPTH} maps and lists")
        self._open.add(id(tree))
        try:
            return self._read_new(tree, path, place)
        finally:
            self._open.discard(id(tree))

    def _read_new(self, tree: yaml.Node, path: tuple[Key, ...], place: Place) -> Node:
        if isinstance(tree, yaml.MappingNode) and tree.tag == _STANDARD + "map":
            return Node(self._read_map(tree, path), place)
        if isinstance(tree, yaml.SequenceNode) and tree.tag == _STANDARD + "seq":
            return Node([self.read(item, (*path, i)) for i, item in enumerate(tree.value)], place)
        if isinstance(tree, yaml.ScalarNode):
            return self._read_scalar(tree, path, place)
        return self._fault(place, path, f"the tag {tree.tag!r} is not supported; write a plain value")

    def _read_map(self, tree: yaml.MappingNode, path: tuple[Key, ...]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key_node, value_node in tree.value:
            place = Place(f"{self.name}:{key_node.start_mark.line + 1}")
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(place, path, "a key must be one word")
                continue
            key = str(key_node.value)
            if key in found:
                first = found[key].place.text
                self._fault(place, (*path, key), f"the key stands twice, first at {first}; keep one")
                continue
            child = self.read(value_node, (*path, key))
            found[key] = replace(child, place=place)
        return found

    def _read_scalar(self, tree: yaml.ScalarNode, path: tuple[Key, ...], place: Place) -> Node:
        kind = tree.tag.removeprefix(_STANDARD)
        text = str(tree.value)
        if kind == "str":
            return Node(text, place) if _is_unicode(text) else self._fault(place, path, "holds half of a character")
        if kind not in _SCALAR_PATTERNS:
            return self._fault(place, path, f"the tag {tree.tag!r} is not supported; write a plain value")
        if not _SCALAR_PATTERNS[kind][0].match(text):
            return self._fault(place, path, f"{text!r} is not a YAML {kind}")
        if kind == "int" and not _fits_machine(text):
            return self._fault(place, path, f"a number of {len(text)} digits is beyond 64 bits")
        return Node(_scalar(kind, text), place)

    def _fault(self, place: Place, path: tuple[Key, ...], message: str) -> Node:
        self.faults.append(Fault(place, path, message))
        return Node(None, place)


def _scalar(kind: str, text: str) -> bool | int | float | None:
    if kind == "null":
        return None
    if kind == "bool":
        return _BOOLEANS[text]
    digits = text.replace("_", "")
    if kind == "int":
        return int(digits)
    return float(digits.replace(".inf", "inf").replace(".nan", "nan"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fits_machine(digits: str) -> bool:
    return len(digits) < 100 and int(digits.replace("_", "")).bit_length() <= 64


def describe(value: object) -> str:
    """A short name of a value's YAML kind, for messages."""
    kinds: Mapping[type, str] = {dict: "map", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def merge(base: Node, over: Node) -> Node:
    """`over` upon `base`: maps merge key by key, all else is replaced; so is a map whose `kind` changes.

    null in place of a map takes it out, so that `objectives.mlm=null` drops an inherited objective.
    """
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    old_kind, new_kind = base.value.get("kind"), over.value.get("kind")
    if old_kind is not None and new_kind is not None and old_kind.value != new_kind.value:
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        if key in merged and isinstance(merged[key].value, dict) and child.value is None:
            del merged[key]
        else:
            merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.place if over.place.override is None else base.place)


def read_overrides(overrides: Sequence[str]) -> Node:
    """`a.b=value` arguments as one map; of two that set the same key, the later one counts."""
    root = Node({}, Place("command line", override=""))
    faults: list[Fault] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        place = Place(f"command line: {text}", override=key)
        if not equals or not all(key.split(".")) or key.count(".") > MAX_DEPTH:
            faults.append(Fault(place, (), "saw no `key=value`; write e.g. optimizer.lr=1e-3"))
            continue
        try:
            node = _move(read_text(value, "value"), place)
        except ConfigError as error:
            faults.append(Fault(place, (), f"{error}; put the value in quotes if it is text".replace("\n", ", ")))
            continue
        for part in reversed(key.split(".")):
            node = Node({part: node}, place)
        root = merge(root, node)
    refuse(faults)
    return root


def _move(node: Node, place: Place) -> Node:
    """The same values, all of them at one place."""
    if isinstance(node.value, dict):
        return Node({key: _move(child, place) for key, child in node.value.items()}, place)
    if isinstance(node.value, list):
        return Node([_move(child, place) for child in node.value], place)
    return Node(node.value, place)


def read_with_defaults(path: Path, folders: Sequence[Path]) -> Node:
    """A run file upon the files its `defaults:` names, each of which may name more.

    A name is looked up beside the file that names it, then beside the run file, then in `folders`.
    """
    return _read_stack(path, (path.parent, *folders), (), {})


def _read_stack(path: Path, folders: Sequence[Path], above: tuple[Path, ...], known: dict[Path, Node]) -> Node:
    """`known`: files read before with all below them, since two may name the same third."""
    if path in known:
        return known[path]
    if path.resolve() in above:
        chain = " -> ".join(str(p) for p in (*above, path.resolve()))
        raise ConfigError(f"{path}: its defaults lead back to itself: {chain}; remove one of them")
    root = read_file(path)
    assert isinstance(root.value, dict)
    names = root.value.get("defaults")
    merged = Node({}, root.place)
    for name in _default_names(names):
        file = _find_default(name, (path.parent, *folders))
        merged = merge(merged, _read_stack(file, folders, (*above, path.resolve()), known))
    own = {key: child for key, child in root.value.items() if key != "defaults"}
    known[path] = merge(merged, Node(own, root.place))
    return known[path]


def _default_names(names: Node | None) -> list[Node]:
    if names is None:
        return []
    if not isinstance(names.value, list) or not all(isinstance(item.value, str) for item in names.value):
        raise ConfigError(f"{names.place.text}: defaults: saw {names.plain()!r}, expected a list of file names")
    return names.value


def _find_default(name: Node, folders: Sequence[Path]) -> Path:
    tried: list[Path] = []
    for folder in dict.fromkeys(folders):
        for candidate in (folder / str(name.value), folder / f"{name.value}.yaml"):
            if candidate.is_file():
                return candidate
        tried.append(folder)
    places = ", ".join(map(str, tried))
    raise ConfigError(f"{name.place.text}: defaults: there is no {name.value!r} (or with .yaml) in {places}")
