"""The contract that every peer's script keeps, and the process that it runs in.

    python eval/peers/PEER.py MODEL TOKENS OUT [--asymmetric] [options of its own]

TOKENS is a JSON file of equally long lists of token ids.  OUT becomes a plain float32 checkpoint of dequantized
weights (`plain.py`).  A script has two functions: `quantize(asked, packed)`, the peer's work up to the files that it
would give to a user, and `weights(asked, packed)`, which reads these back.  The first is timed, imports included, the
second is not: what it takes is noted in OUT and taken off again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import first_error, interpreter
from plain import write_plain
from process import Measured, ProcessError, measured

UNPACKING = "unpacking.json"


class PeerError(Exception):
    """A peer that cannot be installed or does not finish; the message is its own first word on that."""


def main(
    name: str,
    requirements: list[str],
    script: str,
    quantize: Callable[[argparse.Namespace, Path], None],
    weights: Callable[[argparse.Namespace, Path], Mapping[str, Any]],
    options: Iterable[tuple[str, dict[str, Any]]] = (),
) -> None:
    """A script's command line: outside its environment it makes that and calls itself there, inside it works."""
    parser = argparse.ArgumentParser(prog=Path(script).name)
    for positional in ("model", "tokens", "out"):
        parser.add_argument(positional, type=lambda path: Path(path).resolve())
    parser.add_argument("--asymmetric", action="store_true")
    for flag, settings in options:
        parser.add_argument(flag, **settings)
    asked = parser.parse_args()
    if Path(sys.prefix).name != name:
        print(time_peer(name, requirements, Path(script), sys.argv[1:]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel leaves logs in the folder that it is run in
        quantize(asked, Path(scratch) / "packed")
        wall, cpu = time.monotonic(), time.process_time()
        write_plain(asked.model, dict(weights(asked, Path(scratch) / "packed")), asked.out)
        spent = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        (asked.out / UNPACKING).write_text(json.dumps(spent))
        os.chdir("/")


def windows(tokens: Path) -> list[list[int]]:
    """The calibration tokens."""
    found: list[list[int]] = json.loads(tokens.read_text())
    return found


def time_peer(name: str, requirements: list[str], script: Path, arguments: list[str]) -> Measured:
    """Install where needed, which is not timed, then run `script` with MODEL TOKENS OUT and what else it takes.

    Raises InstallError and PeerError.
    """
    python = interpreter(name, requirements)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            taken = measured([str(python), str(script.resolve()), *arguments], Path(scratch) / "log")
        except ProcessError as error:
            raise PeerError(first_error(error.output)) from error
    unpacking = json.loads((Path(arguments[2]) / UNPACKING).read_text())
    return replace(taken, **{key: getattr(taken, key) - unpacking[key] for key in unpacking})
