"""The contract of the scripts of all peers, and their process.

    python eval/peers/PEER.py MODEL TOKENS OUT [--asymmetric] [--group-size 128] [other options]

TOKENS is a JSON file of token id lists of equal length. OUT becomes a plain float32 checkpoint of dequantized weights
(`plain.py`). A script has two functions: `quantize(options, packed)`, which writes the files that a user of the peer
gets, and `weights(options, packed)`, which reads them back. The first is timed, including imports. The time of the
second is written to OUT and subtracted. OUT also tells the size of the files of the first.
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

UNPACKING, SIZE = "unpacking.json", "size.json"
TENSORS = (".safetensors", ".npz", ".pt", ".gguf")


class PeerError(Exception):
    """A peer that cannot be installed or does not finish; the message is its first error."""


def main(
    name: str,
    requirements: list[str],
    script: str,
    quantize: Callable[[argparse.Namespace, Path], None],
    weights: Callable[[argparse.Namespace, Path], Mapping[str, Any]],
    extra: Iterable[tuple[str, dict[str, Any]]] = (),
) -> None:
    """The command line of a script: makes the environment and runs the script in it, or does the work if inside."""
    parser = argparse.ArgumentParser(prog=Path(script).name)
    for positional in ("model", "tokens", "out"):
        parser.add_argument(positional, type=lambda path: Path(path).resolve())
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--group-size", type=int, default=128)
    for flag, settings in extra:
        parser.add_argument(flag, **settings)
    options = parser.parse_args()
    if Path(sys.prefix).name != name:
        print(time_peer(name, requirements, Path(script), sys.argv[1:]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel writes logs to the current folder
        quantize(options, Path(scratch) / "packed")
        size = sum(file.stat().st_size for file in (Path(scratch) / "packed").rglob("*") if file.suffix in TENSORS)
        wall, before = time.monotonic(), os.times()
        write_plain(options.model, dict(weights(options, Path(scratch) / "packed")), options.out)
        after = os.times()
        user, system = after.user - before.user, after.system - before.system
        spent = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": user + system, "user_seconds": user}
        (options.out / UNPACKING).write_text(json.dumps(spent))
        (options.out / SIZE).write_text(json.dumps({"file_megabytes": size / 1e6}))
        os.chdir("/")


def windows(tokens: Path) -> list[list[int]]:
    """The calibration tokens."""
    sequences: list[list[int]] = json.loads(tokens.read_text())
    return sequences


def time_peer(name: str, requirements: list[str], script: Path, arguments: list[str]) -> Measured:
    """Install if necessary, which is not timed, then run `script` with MODEL TOKENS OUT and other arguments.

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
