r"""stdout and stderr of the command line: everything that llmq prints goes through here.

Names, templates and messages of a checkpoint come from strangers, and so does generated text. A terminal obeys the
control characters in them: they can move the cursor over earlier lines, or write to the clipboard. So there are two
barriers:

* `printable` (`llmq/report/escaped.py`) replaces every control character by its escape (`\x1b`). `terminal.py` calls it
  for all text of llmq.
* `Guarded` does the same for everything that is written to the two streams, except for the sequences with which rich
  and tqdm draw colors and bars. It covers log messages, warnings and tracebacks of other packages.

A stream that cannot be written, such as a file on a full disk, is an error of llmq and not a traceback.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from llmq.errors import StorageError
from llmq.report.escaped import CONTROL, escape, printable

_DRAWING = re.compile(rf"(\x1b\[\??[0-9;]*[A-Khlm]|\r)|{CONTROL}")  # colors, cursor moves, erased lines


def print_text(text: str = "", *, end: str = "\n", flush: bool = False, error: bool = False) -> None:
    """Print text on stdout, or on stderr; lines that end as on Windows get the usual end."""
    print(printable(text.replace("\r\n", "\n")), end=end, flush=flush, file=sys.stderr if error else sys.stdout)


class Guarded:
    """A stream of the process. `reports` is whether a failure to write is raised: where errors go, nobody reads it."""

    def __init__(self, stream: TextIO, *, reports: bool) -> None:
        self._stream = stream
        self._reports = reports

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failing():
            self._stream.write(_DRAWING.sub(lambda match: match[1] or escape(match), text))
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            closed = error.errno == errno.EPIPE  # the reader has gone, as in `llmq inspect MODEL | head`
            self._discard()
            if self._reports and closed:
                raise
            if self._reports:
                hint = "check the disk and the program that the output goes to"
                raise StorageError(f"the output cannot be written: {error.strerror or error}", hint=hint) from error

    def _discard(self) -> None:
        """Send what is left in the buffer, and all that follows, nowhere: Python writes the buffer when it exits."""
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123  (a device, not a file)
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def guarded() -> Iterator[None]:
    """While open, stdout and stderr are `Guarded`; exit with 1 where the reader of stdout has gone."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an encoding such as Latin-1 has no arrows
    sys.stdout, sys.stderr = Guarded(before[0], reports=True), Guarded(before[1], reports=False)
    try:
        yield
    except BrokenPipeError:
        sys.exit(1)
    finally:
        sys.stdout, sys.stderr = before


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: the message of an error may hold text of a checkpoint, too."""
    print_text("".join(traceback.format_exception(kind, error, trace)), end="", error=True)
