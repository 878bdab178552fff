"""Convert a quantized checkpoint to another format.

    packed weight ──► QuantizedTensor ──► packed weight of the other format ──► read back, compared float for float
    every other tensor, tokenizer, licence ───────────────────────────────────► copied byte for byte

One weight is in memory at a time. Finished weights are kept in the staging folder, as in a run of `quantize`: an
interrupted conversion continues when it is repeated, and the model appears in the folder when it is complete and
compared. A weight that the other format cannot hold is an error, unless it may be re-quantized.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import ConfigError, FormatError
from llmq.export import card
from llmq.export.conversion import Conversion, conversion_identity, writing
from llmq.export.quantized_source import QuantizedSource
from llmq.export.recode import Recoded, nearest, on_grid, recode, requantize, symmetric, widened_scheme
from llmq.formats import tensor_name
from llmq.gguf.folder import export_gguf
from llmq.gguf.reader import Weights
from llmq.numerics.gguf_types import GGUF
from llmq.numerics.scheme import Scheme, WeightScheme
from llmq.report import pages
from llmq.report.events import OnEvent, Progress, ignore
from llmq.report.stored_record import known_report
from llmq.report.verdict import Verdict
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.runtime.load import stored_dtype
from llmq.steps import output_layout
from llmq.steps.linear_names import linear_names
from llmq.verification.integrity import checksums

REQUANTIZE_HINT = (
    "--to float keeps the values, in full size; --allow-requantize re-quantizes such weights, which costs accuracy; "
    "quantizing the original model costs less"
)


class Converter:
    """One conversion: `run` performs it, `report` is the result."""

    def __init__(
        self,
        source: str | Path,
        out: Path,
        to: str,
        *,
        allow_requantize: bool = False,
        overwrite: bool = False,
        remote_code: bool = False,
        origin: Conversion | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """If `source` is an intermediate model, `origin` is the report to continue.

        `identity` then describes the original source by plain values, so that an interrupted conversion can continue.
        """
        formats.load(to)  # raises ConfigError for an unknown format
        self._origin = QuantizedSource(source, out, remote_code=remote_code)
        self._checkpoint, self._packed = self._origin.checkpoint, self._origin.packed
        output_layout.refuse_packed_head(to, self._packed.modules)
        output_layout.refuse_inputs(to, map(self._packed.declared_inputs, self._packed.modules))
        weights = [f"{module}.weight" for module in self._packed.modules]
        others = [name for _, name, _ in self._origin.rest()]
        output_layout.require_writable([to], self._checkpoint, [*weights, *others])
        self._out, self._to = out, to
        self._source = identity or self._checkpoint.fingerprint()
        self._allowed, self._overwrite = allow_requantize, overwrite
        self._model_dtype = stored_dtype(self._checkpoint)
        self._layout = output_layout.layout_of([to], self._model_dtype)
        self._names = linear_names(self._checkpoint, self._packed.modules, remote_code=remote_code)
        self._symmetric = False  # whether every zero point is in the middle, although the file stores zero points
        self._targets: dict[str, WeightScheme] = {}
        self.report = origin or Conversion(str(source), str(out), self._origin.format, to)
        self.report.source_bytes = self._checkpoint.nbytes
        self.report.notes += [*self._origin.notes, *self._names.notes]

    def run(self, on_event: OnEvent = ignore) -> None:
        """Convert the checkpoint. The finished folder appears at the end, unless an equal conversion has written it.

        Raises ConfigError for weights that the format cannot hold unchanged and that may not be re-quantized.
        """
        identity = conversion_identity(self._to, self._source, allow_requantize=self._allowed)
        if self.report.is_done(self._out, identity, overwrite=self._overwrite):
            return
        self._symmetric = self._is_symmetric()
        self._targets = self._planned()
        needed = (3 if self._to == GGUF else 2) * self._checkpoint.nbytes
        with writing(self._out, identity, overwrite=self._overwrite, needed_bytes=needed) as writer:
            self._convert(writer, on_event)
            with writer.finishing() as final:
                self._finish(writer, final, on_event)

    def _is_symmetric(self) -> bool:
        """Whether every weight is symmetric or can be made so; stops at the first that cannot."""
        affine = [module for module in self._packed.modules if self._packed.is_affine(module)]
        asymmetric = [module for module in affine if not self._packed.scheme(module).symmetric]
        return all(symmetric(self._packed.read(module)) is not None for module in asymmetric)

    def _planned(self) -> dict[str, WeightScheme]:
        """The grid for each weight; raises ConfigError if a weight needs re-quantization that is not allowed."""
        targets: dict[str, WeightScheme] = {}
        refused: dict[str, str] = {}
        for module in self._packed.modules:
            shape = self._packed.shape(module)
            scheme = self._source_scheme(module)
            unchanged = next(
                (s for s in (scheme, widened_scheme(scheme)) if s and not self._layout.refusal(s, *shape)), None
            )
            if scheme is None:
                refused[module] = self._no_integers(module)
            elif unchanged is None:
                refused[module] = str(self._layout.refusal(scheme, *shape))
            target = unchanged or nearest(scheme, self._layout, *shape)
            if target is None:
                raise ConfigError(f"{self._layout.name} has no grid for {module}: {refused[module]}")
            targets[module] = target
        if refused and not self._allowed:
            raise _refusal(refused, self._to)
        return self._on_common_grid(targets)

    def _source_scheme(self, module: str) -> WeightScheme | None:
        if not self._packed.is_affine(module):
            return None
        scheme = self._packed.scheme(module)
        return dataclasses.replace(scheme, symmetric=True) if self._symmetric else scheme

    def _no_integers(self, module: str) -> str:
        return f"it is stored as {self._packed.grid(module)}, and only equal groups of integers are converted"

    def _on_common_grid(self, targets: dict[str, WeightScheme]) -> dict[str, WeightScheme]:
        """The targets, or one grid for all weights if the format cannot mix these grids."""
        try:
            self._settings(targets)
        except ConfigError:
            if not self._allowed:
                raise
            common = Counter(targets.values()).most_common(1)[0][0]
            targets = dict.fromkeys(targets, common)
            for module in targets:
                if refusal := self._layout.refusal(common, *self._packed.shape(module)):
                    raise ConfigError(
                        f"{module} cannot have the grid {common} of the other weights: {refusal}"
                    ) from None
            self._settings(targets)
        return targets

    def _convert(self, writer: Writer, on_event: OnEvent) -> None:
        """Write every packed weight into the staging folder, some at a time."""
        done, total = 0, len(self._packed.modules)
        for index, modules in enumerate(self._origin.chunks()):
            if writer.has(index):
                done += len(modules)
                on_event(Progress("converted", done, total, "weights", modules[-1]))
            else:
                tensors: dict[str, Tensor] = {}
                schemes, errors = dict[str, list[Any]](), dict[str, float]()
                for module in modules:
                    recoded = self._recoded(module)
                    q = recoded.quantized
                    packed = self._layout.pack_layer(q, self._packed.inputs(module))
                    tensors |= {tensor_name(module, suffix): part for suffix, part in packed.items()}
                    schemes[module] = list(dataclasses.astuple(q.scheme))
                    if recoded.error is not None:
                        errors[module] = recoded.error
                    done += 1
                    on_event(Progress("converted", done, total, "weights", module))
                writer.commit(index, tensors, {"schemes": schemes, "requantized": errors})
            record = writer.read(index)[1]
            self.report.requantized |= record["requantized"]
            self._targets |= {module: WeightScheme(*scheme) for module, scheme in record["schemes"].items()}

    def _recoded(self, module: str) -> Recoded:
        """Convert one weight; raises ConfigError if it needs re-quantization that is not allowed."""
        target, dtype = self._targets[module], self._layout.scale_dtype(self._model_dtype)
        reason = self._no_integers(module)
        if self._packed.is_affine(module):
            q = self._packed.read(module)
            q = (symmetric(q) or q) if self._symmetric else q
            recoded = recode(q, self._layout, dtype)
            if isinstance(recoded, str) and self._layout.any_scale_dtype:
                recoded = recode(q, self._layout, q.scales.dtype)
            if isinstance(recoded, Recoded) and (same := on_grid(recoded.quantized, target)) is not None:
                return Recoded(same)
            if isinstance(recoded, Recoded) and not self._layout.one_grid:
                return recoded
            reason = recoded if isinstance(recoded, str) else f"{self._to} has one grid for all, and most are {target}"
        if not self._allowed:
            raise _refusal({module: reason}, self._to)
        return requantize(self._packed.weight(module), target, dtype)

    def _finish(self, writer: Writer, final: Path, on_event: OnEvent) -> None:
        """Assemble the model in `final`, and compare it with the source."""
        files, settings = self._origin.companions.files, self._settings(self._targets)
        documents = {CONFIG: json_text(formats.with_settings(self._checkpoint.config, self._layout, settings))}
        if self._layout.config_copy:
            documents[self._layout.config_copy] = json_text(settings)
        if self._to == GGUF:
            between = writer.scratch()
            writer.assemble(between, self._origin.rest(), files, documents)
            file = export_gguf(between, final, self._out).file
            self.report.output_bytes = file.stat().st_size
            self._compare(Weights(file, final), on_event)
        else:
            writer.assemble(final, self._origin.rest(), files, documents)
            made = Checkpoint.open(final)
            self.report.output_bytes = made.nbytes
            self._compare(PackedWeights(made), on_event)
        record = {**self._record(), "checksums": checksums(final)}
        self.report.notes += card.write(final, self._checkpoint.folder, record)
        write_text(final / PROVENANCE_FILE, json_text(record))
        if (run := known_report(record)) is not None:
            pages.write(final, run)

    def _settings(self, targets: Mapping[str, WeightScheme]) -> dict[str, Any]:
        """The quantization_config."""
        schemes = {
            name: Scheme(targets[module], self._packed.declared_inputs(module))
            for name, module in self._names.packed.items()
        }
        return self._layout.declare(schemes, self._names.plain)

    def _compare(self, made: PackedWeights | Weights, on_event: OnEvent) -> None:
        """Raise FormatError if a weight that was not re-quantized differs from the source in any float."""
        modules = [module for module in self._packed.modules if module not in self.report.requantized]
        wrong = []
        for done, module in enumerate(modules, 1):
            if not torch.equal(self._packed.weight(module), made.weight(module)):
                wrong.append(module)
            on_event(Progress("compared", done, len(modules), "weights", module))
        self.report.compared, self.report.differ = len(modules), len(wrong)
        if wrong:
            raise FormatError(
                f"{len(wrong)} of {len(modules)} converted weights differ from the source, first {wrong[0]}; no model "
                "was written",
                hint="this is a bug in llmq: please report it with the name of the model",
            )

    def _record(self) -> dict[str, Any]:
        """The record of the run that quantized the model, if there is one, and of all conversions since.

        Its verdict is about the same weights, unless some were re-quantized.
        """
        report, record = self.report, self._origin.record(self.report)
        if report.requantized and record.get("verdict") is not None:
            why = f"{len(report.requantized)} weights were re-quantized for {report.format} after the measurement"
            record["verdict"] = dataclasses.asdict(Verdict(f"The quality was not measured: {why}."))
        return record


def _refusal(refused: Mapping[str, str], to: str) -> ConfigError:
    module, reason = next(iter(refused.items()))
    more = f" ({len(refused) - 1} more weights)" if len(refused) > 1 else ""
    return ConfigError(f"{module}{more} cannot be converted to {to} unchanged: {reason}", hint=REQUANTIZE_HINT)
