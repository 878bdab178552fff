"""The errors that llmq raises, and their exit codes.

    LlmqError                                                                   exit 1
    ├── ConfigError            a setting is wrong, or two contradict            exit 2
    ├── CheckpointError        a file is missing, truncated or corrupt          exit 3
    │   └── FormatError        tensors do not match their declared format       exit 3
    ├── UnsupportedModelError  not a causal language model, or not supported    exit 4
    ├── CalibrationError       calibration or evaluation text is unusable       exit 5
    ├── BackendError           the requested device or kernel cannot run here   exit 6
    ├── StorageError           the output cannot be written                     exit 7
    ├── QualityError           a model is worse than the limit                  exit 8
    └── Interrupted            Ctrl-C; finished work is kept                    exit 130

A message says what was found and what was expected; `hint` says what to try.
"""

from collections.abc import Iterable


class LlmqError(Exception):
    """The base class: `str(error)` says what was found and expected, `error.hint` what to try (may be empty)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LlmqError):
    exit_code = 2


class CheckpointError(LlmqError):
    exit_code = 3


class FormatError(CheckpointError):
    pass


class UnsupportedModelError(LlmqError):
    exit_code = 4


class CalibrationError(LlmqError):
    exit_code = 5


class BackendError(LlmqError):
    exit_code = 6


class StorageError(LlmqError):
    exit_code = 7


class QualityError(LlmqError):
    exit_code = 8


class Interrupted(LlmqError):  # noqa: N818  (the user wanted it, so it is not called an error)
    exit_code = 130


def listed(values: Iterable[object]) -> str:
    """`a, b, c`"""
    return ", ".join(str(value) for value in values)
