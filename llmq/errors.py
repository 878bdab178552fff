"""Everything llmq raises on purpose.

    LlmqError                                                                   exit 1
    ├── ConfigError            the request contradicts itself                   exit 2
    ├── CheckpointError        a file is missing, cut short or corrupt          exit 3
    │   └── FormatError        tensors do not match the format they claim       exit 3
    ├── UnsupportedModelError  not a causal language model, or not ours to run  exit 4
    ├── CalibrationError       calibration or evaluation text is unusable       exit 5
    ├── BackendError           the device or kernel asked for cannot run here   exit 6
    ├── StorageError           the output cannot be written                     exit 7
    ├── QualityError           a model is worse than was allowed                exit 8
    └── Interrupted            Ctrl-C; what was finished is kept                exit 130

A message says what was found and what was expected; `hint` says what to try.
"""

from collections.abc import Iterable


class LlmqError(Exception):
    """Base of everything below; `str(error)` is the finding, `error.hint` the way out (may be empty)."""

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


class Interrupted(LlmqError):  # noqa: N818  (it is no error of anybody's)
    exit_code = 130


def listed(values: Iterable[object]) -> str:
    """`a, b, c`"""
    return ", ".join(str(value) for value in values)
