"""The record of a run: append-only, plain values, stored as `llmq.json` beside the quantized weights."""

import dataclasses
import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROVENANCE_FILE = "llmq.json"
OUTSIDE_THE_BLOCKS = "outside the blocks"  # why embeddings and heads stay as they are: expected, not worth a note


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: its grid, and how far rounding moved it.

    weight_error  ‖W - Ŵ‖ / ‖W‖
    output_error  ‖X(W - Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration tokens; None where nothing was observed
    """

    name: str
    scheme: str
    bits_per_weight: float
    weight_error: float
    output_error: float | None = None
    tokens: int = 0
    damping: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """What best says how much the layer suffered: the output error where there is one."""
        return self.weight_error if self.output_error is None else self.output_error

    @property
    def signal_to_noise(self) -> float:
        """In decibels; infinite where nothing was lost."""
        return math.inf if self.error == 0 else -20 * math.log10(self.error)


@dataclass(frozen=True)
class BlockReport:
    """One decoder block: its layers, what happened to it as a whole, how long it took."""

    path: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    resumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, resumed: bool) -> "BlockReport":
        layers = tuple(LayerReport(**{**layer, "notes": tuple(layer["notes"])}) for layer in values["layers"])
        return cls(values["path"], layers, tuple(values["notes"]), values["seconds"], resumed)


@dataclass
class Report:
    """The whole run.

    bits_per_weight counts scales and zeros, over the weights that were quantized; `left` maps each linear layer that
    stayed as it is to the reason; `notes` are the fallbacks and surprises that a user should know of.
    """

    source: str
    output: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bits_per_weight: float = 0.0
    seconds: float = 0.0
    file_bytes: int = 0
    original_bytes: int = 0
    peak_memory_bytes: int = 0

    @property
    def layers(self) -> list[LayerReport]:
        return [layer for block in self.blocks for layer in block.layers]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def peak_memory() -> int:
    """The most memory, in bytes, that this process has had in use so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would begin with what the parent process had
        lines = status.read_text(encoding="utf-8").splitlines()
        found = [line.split() for line in lines if line.startswith("VmHWM:")]
        if found:
            return int(found[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
