"""`QuantizedSource`: the quantized checkpoint that a conversion reads, whatever it is converted to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import Part
from llmq.checkpoint.side_files import companions
from llmq.errors import ConfigError
from llmq.export.conversion import Conversion, record_of
from llmq.report.stored_record import read_record
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings, required_settings
from llmq.runtime.open_skeleton import compared
from llmq.steps import output_layout

CHUNK_BYTES = 256 << 20  # of packed weights that are written together


class QuantizedSource:
    """A quantized checkpoint, compared with its model before any work.

    format      the `quant_method` in config.json
    checkpoint  its tensors, with one name for each
    packed      its packed weights
    companions  the files that are copied unchanged
    notes       for the user
    """

    def __init__(self, source: str | Path, out: Path, *, remote_code: bool = False) -> None:
        """Raises FormatError for a float checkpoint; ConfigError if `out` is the source, or is named like a file."""
        output_layout.require_folder_name(out)
        checkpoint = Checkpoint.open(hub.locate(str(source), None, remote_code=remote_code))
        if out.resolve() == checkpoint.folder.resolve():
            raise ConfigError(f"{out} is the source, which is never changed", hint="give another output folder")
        required_settings(checkpoint)  # raises FormatError for a float checkpoint
        comparison = compared(checkpoint, remote_code=remote_code)
        self.checkpoint = comparison.checkpoint
        self.format = str((quantization_settings(self.checkpoint) or {}).get("quant_method"))
        self.packed = PackedWeights(self.checkpoint)
        self.companions = companions(self.checkpoint.folder)
        self.notes = [*comparison.notes, *self.companions.notes]

    def dropped_inputs(self, to: str) -> list[str]:
        """A note for a model with quantized inputs, converted to something that does not declare them."""
        if not any(map(self.packed.declared_inputs, self.packed.modules)):
            return []
        return [f"the inputs of layers are quantized in {self.format}, and not in {to}"]

    def chunks(self) -> Iterator[list[str]]:
        """The packed modules in parts of about `CHUNK_BYTES`, in order."""
        modules: list[str] = []
        filled = 0
        for module in self.packed.modules:
            nbytes = self.packed.stored_bytes(module)
            if modules and filled + nbytes > CHUNK_BYTES:
                yield modules
                modules, filled = [], 0
            modules.append(module)
            filled += nbytes
        if modules:
            yield modules

    def rest(self) -> list[Part]:
        """All tensors that do not belong to packed weights."""
        packed = {name for module in self.packed.modules for name in self.packed.tensor_names(module)}
        locations = {name: self.checkpoint.location(name) for name in self.checkpoint.names() if name not in packed}
        return [(location.file, name, location.info) for name, location in locations.items()]

    def other_names(self) -> list[str]:
        """The names of all tensors that a float model has in addition to the quantized weights.

        Tensors that describe quantized activations or caches, which llmq does not apply, are left out.
        """
        return [name for _, name, _ in self.rest() if not self.packed.is_noted(name)]

    def record(self, report: Conversion) -> dict[str, Any]:
        """The record of the run that quantized the model, if there is one, and of all conversions since."""
        return record_of(report, read_record(self.checkpoint.folder))
