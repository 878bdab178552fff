"""Settings as TOML, JSON and the command line give them: plain values, each key known and of its kind."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmq.errors import ConfigError

KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a number": lambda value: type(value) in (int, float),
    "a whole number": lambda value: type(value) is int,
    "true or false": lambda value: type(value) is bool,
    "a number, channel or tensor": lambda value: isinstance(value, str) or type(value) is int,
    "a block of keys": lambda value: isinstance(value, Mapping),
    "a list of texts": lambda value: isinstance(value, list | tuple) and all(isinstance(v, str) for v in value),
    "a text or a list of texts": lambda value: isinstance(value, str) or KINDS["a list of texts"](value),
    "a list of blocks": lambda value: isinstance(value, list | tuple) and all(isinstance(v, Mapping) for v in value),
}


def require_known(what: str, found: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Every key must be known, and its value of that kind: TOML gives whatever somebody wrote."""
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"unknown {what}: {key!r}", hint=f"known are {listed(sorted(known))}")
        if not KINDS[known[key]](value):
            raise ConfigError(f"{key} is {value!r}, expected {known[key]}")


def listed(values: Iterable[object]) -> str:
    """`a, b, c`"""
    return ", ".join(str(value) for value in values)
