"""Patterns over module names, as --skip and --override take them."""

import fnmatch
import re

from llmq.errors import ConfigError


def matches(pattern: str, module: str) -> bool:
    """Whether a module name (`model.layers.0.mlp.down_proj`) fits a glob, or a regular expression after `re:`.

    A glob must cover the whole name or a tail of it that starts after a dot: `down_proj`, `layers.0.*`, `*.k_proj`.
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], module) is not None
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")


def require_pattern(pattern: str) -> None:
    """Raise ConfigError for what is no pattern."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None
