"""Patterns that match module names: those of --skip and --override, and regular expressions from checkpoints.

A regular expression may take exponential time. The engine of the package `regex`, which has the syntax of `re`, stops
after a limit, so neither a checkpoint nor a mistake in a setting keeps llmq busy for long.
"""

import fnmatch
import time
import warnings
from typing import Any

import regex

from llmq.errors import ConfigError, FormatError

SECONDS = 1.0  # of CPU time; a plain pattern takes a few microseconds per name
INVALID = (regex.error, OverflowError, RecursionError, MemoryError)  # what compiling a pattern raises


class Pattern:
    """A regular expression from a checkpoint, which may take `SECONDS` of CPU time for all names together.

    `text` without `re:`. Raises FormatError if it is not valid.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._left = SECONDS
        try:
            self._compiled = _compiled(text)
        except INVALID as error:
            message = f"quantization_config holds {_short(text)}, expected a regular expression: {error}"
            raise FormatError(message) from None

    def match(self, name: str) -> bool:
        """Whether the pattern matches from the first character of the name. Raises FormatError after the limit."""
        return self._timed(self._compiled.match, name)

    def search(self, name: str) -> bool:
        """Whether the pattern matches anywhere in the name. Raises FormatError after the limit."""
        return self._timed(self._compiled.search, name)

    def _timed(self, find: Any, name: str) -> bool:
        start = time.thread_time()
        try:
            matched = find(name, timeout=self._left) is not None
        except (TimeoutError, MemoryError):
            self._left = 0.0
        else:
            self._left -= time.thread_time() - start
        if self._left <= 0:
            message = f"the pattern {_short(self._text)} in quantization_config takes more than {SECONDS:g} s to match"
            raise FormatError(message, hint="replace it by a simpler pattern, or do not trust this checkpoint")
        return matched


def matches(pattern: str, module: str) -> bool:
    """Whether a module name (`model.layers.0.mlp.down_proj`) matches a glob, or a regular expression after `re:`.

    A glob must match the whole name or the end of it after a dot: `down_proj`, `layers.0.*`, `*.k_proj`.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")
    try:
        return _compiled(pattern[3:]).search(module, timeout=SECONDS) is not None
    except TimeoutError:
        message = f"the pattern {_short(pattern)} takes more than {SECONDS:g} s to match {module}"
        raise ConfigError(message, hint="use a pattern without repetitions inside of repetitions") from None


def require_pattern(pattern: str) -> None:
    """Raise ConfigError for an invalid pattern."""
    if pattern.startswith("re:"):
        try:
            _compiled(pattern[3:])
        except INVALID as error:
            raise ConfigError(
                f"the pattern {_short(pattern)} is not a valid regular expression: {error}",
                hint="leave re: out for a glob, such as '*.down_proj'",
            ) from None


def _compiled(text: str) -> Any:
    """The package keeps compiled patterns, so this costs little for a pattern that was compiled before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about syntax that may change its meaning
        return regex.compile(text)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}…"
