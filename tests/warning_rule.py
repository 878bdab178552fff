"""Which warnings are errors: those that our code raises, or causes by how it calls another package.

A package that deprecates something for itself, or calls another package in a deprecated way, cannot be fixed here,
so its next release must not make the tests fail.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("llmq", "kernels", "scripts", "eval", "tests"))
# Frames between a caller and its callee that are not the cause: module calls, decorators, contexts.
PASSED_THROUGH = (
    "/warnings.py",
    "/contextlib.py",
    "/functools.py",
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
    "/llmq/cli/terminal.py",  # prints the warning
)


def caused_by_us(frame: FrameType | None) -> bool:
    """Whether the warning raised in `frame` is ours: raised in our code, or in a package that our code called."""
    package: Path | None = None
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.endswith(PASSED_THROUGH):
            if file.startswith(OURS):
                return True
            package = package or _package(file)
            if _package(file) != package:
                return False  # another package called it
        frame = frame.f_back
    return False


def _package(file: str) -> Path:
    """The installed package that a file belongs to; for a module of the standard library, the file itself."""
    path = Path(file)
    for parent in path.parents:
        if parent.parent.name == "site-packages":
            return parent
    return path


@contextmanager
def errors_for_our_warnings() -> Iterator[None]:
    """While open, a warning that our code causes is raised where it is issued; others are recorded as usual."""
    record = warnings._showwarnmsg_impl  # type: ignore[attr-defined]  # pytest's, which `warnings` offers no name for

    def show(message: Warning, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if caused_by_us(sys._getframe(1)):
            raise message
        record(warnings.WarningMessage(message, category, filename, lineno, file, line))

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = before
