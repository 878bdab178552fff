"""Convert a quantized checkpoint to a float one: a plain Hugging Face folder, for tools that read no quantized format.

Every quantized weight is written as the floats that it stands for, under its name in the original model. All other
tensors are copied unchanged, and config.json declares no quantization. float32 holds each weight exactly; a narrower
dtype rounds it once more, and the conversion reports by how much.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import ConfigError, FormatError
from llmq.export import FLOAT, FLOAT_DTYPES, card
from llmq.export.conversion import Conversion, conversion_identity, writing
from llmq.export.float_names import require_readable
from llmq.export.quantized_source import QuantizedSource
from llmq.formats import float_config
from llmq.report.events import OnEvent, Progress, ignore
from llmq.verification.integrity import checksums

DTYPE_KEYS = ("dtype", "torch_dtype")  # of config.json; older versions of transformers read the second


class FloatConverter:
    """One conversion to floats: `run` performs it, `report` is the result."""

    def __init__(
        self,
        source: str | Path,
        out: Path,
        dtype: str = FLOAT_DTYPES[0],
        *,
        overwrite: bool = False,
        remote_code: bool = False,
    ) -> None:
        if dtype not in FLOAT_DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}")
        self._origin = QuantizedSource(source, out, remote_code=remote_code)
        require_readable(self._origin, remote_code=remote_code)
        self._packed = self._origin.packed
        self._out, self._overwrite = out, overwrite
        self._name, self._dtype = dtype, getattr(torch, dtype)
        self._rounded: dict[str, float] = {}  # ‖W - Ŵ‖ / ‖W‖ of weights that the dtype does not hold exactly
        self.report = Conversion(str(source), str(out), self._origin.format, FLOAT)
        self.report.source_bytes = self._origin.checkpoint.nbytes
        self.report.notes += self._origin.notes
        self.report.notes += self._origin.dropped_inputs(FLOAT)

    def run(self, on_event: OnEvent = ignore) -> None:
        """Convert the checkpoint. The finished folder appears at the end, unless an equal conversion has written it.

        Raises FormatError for weights that are too large for the dtype.
        """
        identity = conversion_identity(FLOAT, self._origin.checkpoint.fingerprint(), dtype=self._name)
        if self.report.is_done(self._out, identity, overwrite=self._overwrite):
            return
        with writing(self._out, identity, overwrite=self._overwrite, needed_bytes=2 * self._nbytes()) as writer:
            self._convert(writer, on_event)
            with writer.finishing() as final:
                self._finish(writer, final, on_event)

    def _nbytes(self) -> int:
        """The size of the result."""
        weights = sum(N * K for N, K in map(self._packed.shape, self._packed.modules))
        itemsize: int = self._dtype.itemsize
        return self._origin.checkpoint.nbytes + weights * itemsize

    def _convert(self, writer: Writer, on_event: OnEvent) -> None:
        """Write the floats of every packed weight into the staging folder, some at a time."""
        done, total = 0, len(self._packed.modules)
        for index, modules in enumerate(self._origin.chunks()):
            if not writer.has(index):
                tensors: dict[str, Tensor] = {}
                rounded: dict[str, float] = {}
                for module in modules:
                    weight = self._packed.weight(module)
                    tensors[self._packed.weight_name(module)] = narrow = self._narrowed(module, weight)
                    if (error := relative_error(weight, narrow)) > 0:
                        rounded[module] = error
                    on_event(Progress("converted", done + len(tensors), total, "weights", module))
                writer.commit(index, tensors, {"rounded": rounded})
            done += len(modules)
            self._rounded |= writer.read(index)[1]["rounded"]

    def _narrowed(self, module: str, weight: Tensor) -> Tensor:
        """The weight in the dtype of the result; raises FormatError if it overflows."""
        return narrowed(module, weight, self._dtype)

    def _finish(self, writer: Writer, final: Path, on_event: OnEvent) -> None:
        """Assemble the model in `final`, and compare it with the source."""
        documents = {CONFIG: json_text(self._config())}
        kept = set(self._origin.other_names())
        rest = [part for part in self._origin.rest() if part[1] in kept]
        writer.assemble(final, rest, self._origin.companions.files, documents)
        made = Checkpoint.open(final)
        self._compare(made, on_event)
        self.report.output_bytes = made.nbytes
        if self._rounded:
            self.report.notes.append(rounded_note(self._rounded, len(self._packed.modules), self._name))
        record = {**self._origin.record(self.report), "checksums": checksums(final)}
        self.report.notes += card.write(final, self._origin.checkpoint.folder, record)
        write_text(final / PROVENANCE_FILE, json_text(record))

    def _config(self) -> dict[str, Any]:
        """config.json with the new dtype and without a quantization."""
        return in_floats(self._origin.checkpoint.config, self._name)

    def _compare(self, made: Checkpoint, on_event: OnEvent) -> None:
        """Raise FormatError if a weight in the file is not that of the source in the new dtype."""
        modules = self._packed.modules
        for done, module in enumerate(modules, 1):
            if not torch.equal(
                self._packed.weight(module).to(self._dtype), made.tensor(self._packed.weight_name(module))
            ):
                raise FormatError(
                    f"{module} in the new file differs from the source; no model was written",
                    hint="check the disk; if it is sound, this is a bug in llmq: please report it",
                )
            on_event(Progress("compared", done, len(modules), "weights", module))
        self.report.compared, self.report.differ = len(modules), len(self._rounded)


def in_floats(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The content of config.json with another dtype and without a quantization."""
    plain = float_config(config)
    inner = plain.get("text_config")
    for part in (plain, *([inner] if isinstance(inner, dict) else [])):
        part.update({key: dtype for key in DTYPE_KEYS if key in part})
    return plain if any(key in plain for key in DTYPE_KEYS) else {**plain, DTYPE_KEYS[0]: dtype}


def narrowed(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype; raises FormatError if it overflows."""
    narrow = weight.to(dtype).contiguous()
    if not bool(narrow.isfinite().all()):
        written = str(dtype).removeprefix("torch.")
        message = f"{name} has weights up to {float(weight.abs().max()):.3g}, which {written} cannot hold"
        raise FormatError(message, hint="use --dtype float32 or bfloat16")
    return narrow


def rounded_note(errors: Mapping[str, float], weights: int, dtype: str) -> str:
    """How many of the `weights` a dtype rounded, from their relative errors by name."""
    return (
        f"{len(errors)} of {weights} weights were rounded to {dtype}, relative error at most "
        f"{max(errors.values()):.2%}; --dtype float32 holds them exactly"
    )


def relative_error(weight: Tensor, narrow: Tensor) -> float:
    """‖W - Ŵ‖ / ‖W‖ of a weight (N, K) float32 in another dtype."""
    size = float(weight.norm())
    return float((weight - narrow.to(weight.dtype)).norm()) / size if size else 0.0
