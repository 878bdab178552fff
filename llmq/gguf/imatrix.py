"""Importance matrices of llama.cpp: the mean square of each input of each weight, as `llama-imatrix` measures it.

    .gguf            general.type "imatrix"; for each weight NAME.in_sum2 (E, K) and NAME.counts (E, 1), both F32
    .imatrix, .dat   the older form, little-endian: int32 number of weights, and for each of them int32 length of the
                     name, name, int32 calls, int32 number of values, float32 values: mean squares times calls

E experts are stacked, or E = 1.  Names are those of a GGUF file.  Values are read when they are needed.  Every number
of a file is checked before it is used.

Source: github.com/ggml-org/llama.cpp, tools/imatrix.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.checkpoint.safetensors_files import reading
from llmq.config import QuantConfig
from llmq.errors import CalibrationError, ConfigError, UnsupportedModelError
from llmq.gguf.container import Container
from llmq.gguf.names import Names
from llmq.gguf.supported import architecture, language_config
from llmq.methods import Method

SUFFIXES = (".imatrix", ".dat", ".gguf")
SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST_NAME = 128  # bytes
WEIGHTED = "errors are weighted by the importance matrix"  # how a note begins
_NOTE = re.compile(rf"{WEIGHTED} (.+), for \d+ layers;")
FLOOR = 1e-6  # of the mean: inputs that were zero still count a little
TEXT_HINT = "use --method rtn, or give text with --calibration"


def is_meant(source: str) -> bool:
    """Whether a source of calibration is a file of this kind, by its suffix."""
    return Path(source).suffix.lower() in SUFFIXES and Path(source).is_file()


def file_in(notes: Iterable[str]) -> str | None:
    """The name of the file that weighed the errors of a run with these notes; None if there was none."""
    return next((match[1] for note in notes if (match := _NOTE.match(note)) is not None), None)


@dataclass(frozen=True)
class Importance:
    """The importance of the inputs of each layer of one model.

    sha256  of the file
    notes   for the user
    """

    path: Path
    sha256: str
    notes: tuple[str, ...]
    by_layer: Mapping[str, Tensor]

    def of(self, layer: str) -> Tensor | None:
        """(K,) float32 with the mean 1; None where nothing is known about a layer."""
        return self.by_layer.get(layer)


def split(settings: QuantConfig, method: Method) -> tuple[QuantConfig, Path | None]:
    """The settings without the importance matrix among their sources of calibration, and its file.

    Raises ConfigError where it cannot be used.
    """
    sources = settings.calibration.sources
    files = [source for source in sources if is_meant(source)]
    if not files:
        return settings, None
    reasons = {
        f"{settings.method} reads text": method.needs_calibration,
        "--target-bits measures layers on text": settings.target_bits is not None,
        "--scales minmax weighs no errors": settings.scales == "minmax",
        "the scales of fp8 fit the largest weight": settings.scheme.floats in ("fp8", "fp8-block"),
        f"there are {len(files)} of them": len(files) > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{files[0]} is an importance matrix and holds no text, but {reason}", hint=TEXT_HINT)
    text = tuple(source for source in sources if source not in files)
    return settings.replace(calibration=settings.calibration.replace(sources=text)), Path(files[0])


def read(
    file: Path,
    config: Mapping[str, Any],
    layers: Iterable[tuple[str, int]],
    outside: Iterable[tuple[str, int]] = (),
) -> Importance:
    """The importance of the inputs of `layers`, each a name and in_features, of a model with this config.json.

    outside  head and embedding, which few files have values for, so it is not reported if they are missing

    Raises CalibrationError for a damaged file, or one of another model.
    """
    config = language_config(config)
    try:
        names = Names(architecture(config), config)
    except UnsupportedModelError as error:
        message = f"the names in {file} are those of GGUF files, and {error.args[0]}"
        raise CalibrationError(message, hint="leave out the importance matrix") from error
    matrix = _Gguf(file) if file.suffix.lower() == ".gguf" else _Older(file)
    known, missing, layers = dict[str, Tensor](), list[str](), list(layers)
    for layer, K in [*layers, *outside]:
        place = names.place(f"{layer}.weight")
        if place is None or place.name not in matrix:
            missing.append(layer)
            continue
        values = matrix.values(place.name)
        if values.size % K or (place.expert or 0) >= values.size // K or (place.expert is None and values.size != K):
            raise CalibrationError(
                f"{file} has {values.size} values for {place.name}, which has {K} inputs",
                hint="give the file that was made from this model",
            )
        row = values.reshape(-1, K)[place.expert or 0]
        if (order := names.columns(place.name)) is not None:
            row = row[np.argsort(order)]
        if (mean := float(row.mean(dtype=np.float64))) > 0:
            known[layer] = torch.from_numpy((row.astype(np.float64) / mean + FLOOR).astype(np.float32))
    if not known:
        raise CalibrationError(
            f"{file} has no values for the layers of this model", hint="give the file that was made from this model"
        )
    with reading(file), file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    notes = [f"{WEIGHTED} {file.name}, for {len(known)} layers; its SHA-256 is {digest}"]
    inside = {layer for layer, _ in layers}
    if missing := [layer for layer in missing if layer in inside]:
        notes.append(f"{file.name} has no values for {len(missing)} layers, such as {missing[0]}: not weighted")
    return Importance(file, digest, tuple(notes), known)


def _checked(values: NDArray[np.float32], name: str, file: Path) -> NDArray[np.float32]:
    if not (np.isfinite(values) & (values >= 0)).all():
        raise CalibrationError(f"{name} in {file} has values that are not sums of squares", hint="make the file again")
    return values


class _Gguf:
    """The form of today."""

    def __init__(self, file: Path) -> None:
        self._container = Container(file)
        if (kind := self._container.value("general.type")) != "imatrix":
            raise CalibrationError(
                f"general.type of {file} is {kind!r}, expected 'imatrix'", hint="text, or a file of llama-imatrix"
            )

    def __contains__(self, name: str) -> bool:
        return f"{name}{SUMS}" in self._container.tensors and f"{name}{COUNTS}" in self._container.tensors

    def values(self, name: str) -> NDArray[np.float32]:
        """(E * K,) mean squares; all 1 where no token reached an expert."""
        file = self._container.path
        counts, sums = (
            _checked(self._container.floats(f"{name}{part}").flatten().numpy(), name, file) for part in (COUNTS, SUMS)
        )
        if not counts.size or sums.size % counts.size:
            raise CalibrationError(f"{file} has {sums.size} sums for {counts.size} counts of {name}")
        by_expert = sums.reshape(counts.size, -1)
        means = np.divide(by_expert, counts[:, None], out=np.ones_like(by_expert), where=counts[:, None] >= 1)
        return means.reshape(-1)


class _Older:
    """The form of before 2025."""

    def __init__(self, file: Path) -> None:
        self._file, self._size = file, file.stat().st_size
        self._entries: dict[str, tuple[int, int, int]] = {}  # name -> place of the values, their number, calls
        with reading(file), file.open("rb") as opened:
            for _ in range(self._number(opened, "number of weights", self._size // 12)):
                length = self._number(opened, "length of a name", LONGEST_NAME)
                name = opened.read(length).decode("utf-8", errors="replace")
                calls = self._number(opened, f"calls of {name}", 2**31 - 1)
                count = self._number(opened, f"values of {name}", (self._size - opened.tell()) // 4)
                if name in self._entries:
                    raise self._damaged(f"{name} is there twice")
                self._entries[name] = (opened.tell(), count, calls)
                opened.seek(4 * count, 1)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def values(self, name: str) -> NDArray[np.float32]:
        """(E * K,) mean squares."""
        start, count, calls = self._entries[name]
        with reading(self._file):
            stored = np.fromfile(self._file, "<f4", count, offset=start)
        if len(stored) != count:
            raise self._damaged(f"{name} is truncated")
        return _checked(stored, name, self._file) / np.float32(max(calls, 1))

    def _number(self, opened: BinaryIO, what: str, most: int) -> int:
        """The next int32, which is not negative and at most `most`."""
        raw = opened.read(4)
        value = int.from_bytes(raw, "little", signed=True) if len(raw) == 4 else -1
        if not 0 <= value <= most:
            raise self._damaged(f"{what} is {value if len(raw) == 4 else 'missing'}, expected 0 to {most}")
        return value

    def _damaged(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"{self._file} is not an importance matrix of llama.cpp, or it is damaged: {what}",
            hint="a file of llama-imatrix",
        )
