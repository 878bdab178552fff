"""One peer's script, run by the Python of the peer's own environment and measured as a whole process."""

import tempfile
from pathlib import Path

from environment import first_error, interpreter
from process import Measured, ProcessError, measured


class PeerError(Exception):
    """A peer that cannot be installed or does not finish; the message is its own first word on that."""


def time_peer(name: str, requirements: list[str], script: Path, arguments: list[str]) -> Measured:
    """Install where needed, which is not timed, then run `script`; raises InstallError and PeerError."""
    python = interpreter(name, requirements)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            # GPTQModel leaves logs in the folder that it is run in.
            return measured([str(python), str(script.resolve()), *arguments], Path(scratch) / "log", Path(scratch))
        except ProcessError as error:
            raise PeerError(first_error(error.output)) from error
