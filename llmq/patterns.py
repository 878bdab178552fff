"""Patterns that match module names, for --skip and --override."""

import fnmatch
import re

from llmq.errors import ConfigError


def matches(pattern: str, module: str) -> bool:
    """Whether a module name (`model.layers.0.mlp.down_proj`) matches a glob, or a regular expression after `re:`.

    A glob must match the whole name or the end of it after a dot: `down_proj`, `layers.0.*`, `*.k_proj`.
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], module) is not None
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")


def require_pattern(pattern: str) -> None:
    """Raise ConfigError for an invalid pattern."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(
                f"the pattern {pattern!r} is not a valid regular expression: {error}",
                hint="leave re: out for a glob, such as '*.down_proj'",
            ) from None
