"""Parts register by being there: a config class with a `kind` literal in a file of a known folder.

Enter: a package name and the base class of its configs. Leave: every concrete config class found, or one
discriminated union of them for pydantic. Refuses two classes of the same kind.
"""

import importlib
import pkgutil
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args

from pydantic import Field

from mmpretrain.core.config import Config

ConfigT = TypeVar("ConfigT", bound=Config)


def kind_of(cls: type[Config]) -> str:
    """The value of a config class's `kind: Literal[...]` field."""
    return str(get_args(cls.model_fields["kind"].annotation)[0])


@cache
def discover(package: str, base: type[ConfigT]) -> dict[str, type[ConfigT]]:
    """Import every module of `package` and map kind -> config class derived from `base`, sorted by kind."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")
    found: dict[str, type[ConfigT]] = {}
    for cls in _subclasses(base):
        if "kind" not in cls.model_fields or not cls.__module__.startswith(package):
            continue
        kind = kind_of(cls)
        assert kind not in found, f"two {base.__name__} of kind {kind!r}: {found[kind]} and {cls}"
        found[kind] = cls
    return dict(sorted(found.items()))


def union_of(package: str, base: type[ConfigT]) -> Any:
    """A pydantic type: any config of `package` derived from `base`, told apart by `kind`."""
    classes = tuple(discover(package, base).values())
    if len(classes) == 1:
        return classes[0]
    return Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007 - built from a tuple at run time


def _subclasses(cls: type[ConfigT]) -> list[type[ConfigT]]:
    direct = cls.__subclasses__()
    return direct + [deeper for child in direct for deeper in _subclasses(child)]
