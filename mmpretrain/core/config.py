"""Strict configuration: YAML files with their line numbers, defaults, overrides, and every fault at once."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every config class: frozen, unknown keys refused, numbers and booleans never mixed up."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
