"""The contents of a checkpoint, from its headers and its record; weights are not read."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.checkpoint.reader import Checkpoint
from llmq.gguf.container import FLOATS, Container
from llmq.report.shown import Shown, Table, megabytes
from llmq.report.stored_record import read_record
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.open_skeleton import compared


@dataclass(frozen=True)
class StoredWeight:
    """One weight of two or more dimensions: packed on a grid (`scheme`), or in a float `dtype`."""

    name: str
    out_features: int
    in_features: int
    scheme: str | None
    dtype: str
    nbytes: int
    bits_per_weight: float
    error: float | None

    def row(self) -> tuple[str, ...]:
        """The weight as a row of a table."""
        return (
            self.name,
            f"{self.out_features} x {self.in_features}",
            self.scheme or self.dtype,
            f"{self.bits_per_weight:.3f}",
            megabytes(self.nbytes),
            "-" if self.error is None else f"{self.error:.2%}",
        )


@dataclass(frozen=True)
class Inspection(Shown):
    """What a checkpoint holds."""

    format: str | None
    file_bytes: int
    bits_per_weight: float | None
    provenance: dict[str, Any]
    calibration: dict[str, Any] | None  # the manifest of the calibration text
    layers: tuple[StoredWeight, ...]
    unused: tuple[str, ...] = ()  # tensors that belong to no module of the model
    notes: tuple[str, ...] = ()

    def tables(self) -> Iterator[Table]:
        """The whole, and each weight."""
        bits = "-" if self.bits_per_weight is None else f"{self.bits_per_weight:.3f}"
        rows = [
            ("format", self.format or "not quantized"),
            ("size of weights", megabytes(self.file_bytes)),
            ("bits per quantized weight", bits),
            *((name, str(value)) for name, value in self.provenance.items()),
        ]
        yield Table("checkpoint", rows)
        columns = ("weight", "shape", "stored as", "bits/weight", "size", "error")
        yield Table("", [layer.row() for layer in self.layers], columns)

    def remarks(self) -> tuple[str, ...]:
        """The notes."""
        return self.notes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Read the contents of a checkpoint; raises CheckpointError and FormatError.

    The weights of a .gguf file, or of a folder with one, have GGUF names and no errors.
    """
    folder = hub.locate(str(path))
    if (file := gguf_file(folder)) is not None:
        return _inspect_gguf(file)
    checkpoint = Checkpoint.open(folder)
    record = read_record(checkpoint.folder)
    settings = quantization_settings(checkpoint)
    packed = PackedWeights(checkpoint) if settings is not None else None
    comparison = compared(checkpoint, complete=False)
    errors = {
        layer["name"]: layer["weight_error"] if layer["output_error"] is None else layer["output_error"]
        for block in record.get("blocks", ())
        for layer in block["layers"]
    }
    layers = [_packed_weight(packed, module, errors.get(module)) for module in packed.modules] if packed else []
    bits = sum(layer.nbytes * 8 for layer in layers)
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if len(info.shape) >= 2 and info.is_float and name.endswith(".weight"):
            rows, columns = info.shape[0], info.nbytes // info.dtype.itemsize // max(1, info.shape[0])
            dtype = str(info.dtype).removeprefix("torch.")
            layers.append(
                StoredWeight(
                    name.removesuffix(".weight"), rows, columns, None, dtype, info.nbytes, 8 * info.dtype.itemsize, None
                )
            )
    return Inspection(
        format=settings.get("quant_method") if settings else None,
        file_bytes=checkpoint.nbytes,
        bits_per_weight=bits / weights if weights else None,
        provenance=_provenance(record),
        calibration=record.get("calibration"),
        layers=tuple(sorted(layers, key=lambda layer: _natural(layer.name))),
        unused=comparison.left,
        notes=comparison.notes,
    )


def _inspect_gguf(file: Path) -> Inspection:
    container, record = Container(file), read_record(file.parent)
    layers = []
    for name, info in container.tensors.items():
        if len(info.shape) >= 2:
            weights = math.prod(info.shape)
            rows, scheme = weights // info.shape[-1], None if info.kind in FLOATS else info.kind
            bits = 8 * info.nbytes / weights
            module = name.removesuffix(".weight")
            layers.append(StoredWeight(module, rows, info.shape[-1], scheme, info.kind, info.nbytes, bits, None))
    file_bytes, bits_per_weight = container.size()
    return Inspection(
        format="gguf",
        file_bytes=file_bytes,
        bits_per_weight=bits_per_weight,
        provenance=_provenance(record),
        calibration=record.get("calibration"),
        layers=tuple(sorted(layers, key=lambda layer: _natural(layer.name))),
    )


def _packed_weight(packed: PackedWeights, module: str, error: float | None) -> StoredWeight:
    rows, columns = packed.shape(module)
    nbytes = packed.stored_bytes(module)
    return StoredWeight(
        module, rows, columns, packed.grid(module), "packed", nbytes, 8 * nbytes / (rows * columns), error
    )


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    if not record:
        return {}
    text = record.get("calibration") or {}
    return {
        "made from": record.get("source"),
        "by": f"llmq {record.get('versions', {}).get('llmq')}",
        "method": record.get("settings", {}).get("method"),
        "calibration": f"{text['samples']} x {text['seqlen']} tokens of {', '.join(text['sources'])}"
        if text
        else "none",
        "calibration sha256": text.get("sha256", "-"),
    }


def _natural(name: str) -> list[Any]:
    """A key that sorts `layers.10` after `layers.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
