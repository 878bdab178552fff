"""The packed weights of a checkpoint, one at a time: as quantized values on a grid, or as floats."""

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmq import formats
from llmq.checkpoint.index import read_json_object
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, FormatError
from llmq.formats import foreign
from llmq.formats.base import Layout, Readable, Reader, Reading
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme, WeightScheme

INCOMPLETE = "check that the checkpoint is complete"
ORPHAN_HINT = (
    f"{INCOMPLETE}; scales that another tool wrote next to an activation are not supported: quantize the original model"
)


class PackedWeights:
    """The packed weights of a checkpoint, read one at a time.

    modules  their names in the checkpoint; for experts in one tensor, the name of that tensor
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        settings = required_settings(checkpoint)
        self._checkpoint = checkpoint
        self._layout = formats.detect(settings)
        self._reading = _reader(self._layout, settings)
        endings = {formats.tensor_name("", suffix) for suffix in self._layout.codes}
        matches = ((name, ending) for name in checkpoint.names() for ending in endings if name.endswith(ending))
        self.modules = list(dict.fromkeys(name.removesuffix(ending) for name, ending in matches))
        self._by_weight = {self.weight_name(module): module for module in self.modules}
        self._refuse_incomplete()
        self._shapes: dict[str, tuple[int, int]] = {}  # read on request: some layouts store shapes in tensors

    def read(self, module: str) -> QuantizedTensor:
        """Read a weight by its name in the checkpoint; raises FormatError if it is not on an integer grid."""
        reading = self._how(module)
        if reading.decode is not None:
            raise FormatError(f"{module} is stored as {reading.packing}, expected an integer grid")
        try:
            return self._layout.unpack(self._tensors(module), reading)
        except FormatError as error:
            raise FormatError(f"{module}: {error}", hint=error.hint) from error

    def weight(self, module: str) -> Tensor:
        """Read a weight as (N, K) float32, in any packing; stacked experts as (E, K, N)."""
        reading = self._how(module)
        if reading.decode is None:
            return self.read(module).dequantize()
        try:
            return reading.decode(self._tensors(module))
        except FormatError as error:
            raise FormatError(f"{module}: {error}", hint=error.hint) from error

    def tensor(self, name: str) -> Tensor:
        """Read a tensor by its name in the float model; packed tensors are dequantized."""
        module = self._by_weight.get(name)
        return self._checkpoint.tensor(name) if module is None else self.weight(module)

    def member(self, name: str, index: int) -> Tensor:
        """Read one slice of the stacked `tensor(name)`, along its first dimension."""
        module = self._by_weight.get(name)
        if module is None:
            return self._checkpoint.member(name, index)
        decode = self._how(module).decode
        if decode is None:
            return self.weight(module)[index]
        stored = self._stored(module).items()
        slices = {suffix: self._checkpoint.member(stored_name, index)[None] for suffix, stored_name in stored}
        return decode(slices)[0]

    def stored_as(self, name: str) -> list[str]:
        """The tensors of the checkpoint that store the tensor `name` of the float model."""
        module = self._by_weight.get(name)
        return [name] if module is None else self.tensor_names(module)

    def is_noted(self, name: str) -> bool:
        """Whether a tensor belongs to something that `not_applied` names, such as the scale of an input."""
        return name.rpartition(".")[2] in self._layout.not_applied and bool(self.not_applied())

    def _refuse_incomplete(self) -> None:
        """Raise FormatError for a tensor of a packed weight that lacks the tensors without which it cannot be read."""
        own = [suffix for suffix in self._layout.suffixes if suffix != "weight"]
        modules = frozenset(self.modules)
        for name in self._checkpoint.names():
            for suffix in own:
                module = name.removesuffix(formats.tensor_name("", suffix))
                if module != name and module not in modules:
                    missing = " or ".join(formats.tensor_name(module, code) for code in self._layout.codes)
                    raise FormatError(f"the checkpoint has {name}, but not {missing}", hint=ORPHAN_HINT)
        for module in self.modules:
            reading = self._reading(module)
            needed = () if reading is None else self._layout.needs(reading)
            for name in (formats.tensor_name(module, suffix) for suffix in needed):
                if name not in self._checkpoint:
                    raise FormatError(
                        f"the checkpoint has {self.tensor_names(module)[0]}, but not {name}", hint=INCOMPLETE
                    )

        for name in self._checkpoint.names():
            dtype = self._checkpoint.info(name).dtype
            in_8_bits = dtype.itemsize == 1 and dtype.is_floating_point
            if in_8_bits and name.endswith(".weight") and name not in self._by_weight:
                raise FormatError(f"the checkpoint has {name} in 8-bit floats, but not its scale", hint=INCOMPLETE)

    def __contains__(self, name: object) -> bool:
        """Whether `tensor` can read this tensor."""
        return name in self._by_weight or name in self._checkpoint

    def pack(self, module: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """Pack a weight that replaces that of `module`: its tensors by the suffixes of their names."""
        layout = self._layout
        try:
            if not isinstance(layout, Layout):
                raise FormatError(f"the format {layout.name} cannot be written, only read")
            reading = replace(self._how(module), inputs=self.inputs(module))
            return layout.pack_like(weight, reading) if layout.pack_like else layout.pack(weight)
        except FormatError as error:
            raise FormatError(f"{module} cannot be packed: {error}", hint=error.hint) from error

    def is_affine(self, module: str) -> bool:
        """Whether the weight is on an integer grid in equal groups, so that the result of `read` runs packed.

        Groups of an unsupported size run if they can be split into smaller groups, which requires that the columns of
        a group are contiguous.
        """
        reading = self._how(module)
        if reading.decode is not None:
            return False
        K = self.shape(module)[1]
        if reading.needs_group_index and 0 < reading.stored_group < K:
            return False
        return reading.legal_group(K) is not None

    def weight_name(self, module: str) -> str:
        """The name of the weight in the float model."""
        stacked = all(suffix.startswith("_") for suffix in self._layout.codes)
        return module if stacked else f"{module}.weight"

    def is_packed(self, name: str) -> bool:
        """Whether a tensor of the float model is packed here."""
        return name in self._by_weight

    def weight_names(self) -> list[str]:
        """The names of all packed weights in the float model, without duplicates."""
        return list(self._by_weight)

    def grid(self, module: str) -> str:
        """The packing or grid of the weight, in a word or two, and how its inputs are quantized."""
        reading = self._how(module)
        weights = reading.packing if reading.decode is not None else str(reading.scheme)
        return weights if reading.inputs is None else f"{weights}, inputs {reading.inputs}"

    def notes(self) -> list[str]:
        """Notes for a user who runs the model."""
        notes = self.not_applied()
        floats = Counter(self.grid(module) for module in self.modules if not self.is_affine(module))
        return notes + [
            f"{count} weights are stored as {grid}, for which llmq has no kernel: they run dequantized, in full size"
            for grid, count in floats.items()
        ]

    def not_applied(self) -> list[str]:
        """A note for everything except weights that the checkpoint declares as quantized."""
        declared = dict.fromkeys(self._how(module).note for module in self.modules)
        return [
            f"the checkpoint declares {note}, which llmq does not apply: only its weights are quantized here"
            for note in declared
            if note
        ]

    def scheme(self, module: str) -> WeightScheme:
        """The grid of a weight, from config.json only."""
        return self._how(module).scheme

    def declared_inputs(self, module: str) -> InputScheme | None:
        """How the inputs of a module are quantized, from config.json only: without a static scale."""
        return self._how(module).inputs

    def inputs(self, module: str) -> InputScheme | None:
        """How the inputs of a module are quantized; None for float inputs, and for what `not_applied` names."""
        declared = self._how(module).inputs
        if declared is None or not declared.calibrated:
            return declared
        assert isinstance(self._layout, Layout) and self._layout.with_inputs is not None, "it declares inputs"
        try:
            return replace(declared, scale=self._layout.with_inputs.scale(self._tensors(module)))
        except (FormatError, ConfigError) as error:
            raise FormatError(f"{module}: {error}", hint="the scale of its inputs is damaged") from None

    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a weight, packed or not, without reading it; for stacked experts with the rows of all experts."""
        if module not in self._shapes:
            self._shapes[module] = self._read_shape(module)
        return self._shapes[module]

    def _read_shape(self, module: str) -> tuple[int, int]:
        names = self._stored(module)
        if self.weight_name(module) not in self._by_weight:
            N, K = self._checkpoint.info(f"{module}.weight").shape
            return N, K
        shapes = {suffix: self._checkpoint.info(name).shape for suffix, name in names.items()}
        try:
            N, K = self._layout.weight_shape(
                shapes, self._how(module), lambda suffix: self._checkpoint.tensor(names[suffix])
            )
        except (LookupError, ValueError):  # a tensor is missing, or has another number of dimensions
            N = K = 0
        if min(N, K) < 1:
            listed = ", ".join(f"{suffix} {shape}" for suffix, shape in shapes.items())
            raise FormatError(f"{module}: its tensors do not have the shapes of {self._layout.name}: {listed}")
        return N, K

    def suffixes_of(self, module: str) -> list[str]:
        """The suffixes of the tensors that store the weight of a module."""
        return list(self._stored(module))

    def tensor_names(self, module: str) -> list[str]:
        """The tensors of the checkpoint that store the weight of a module."""
        return list(self._stored(module).values())

    def stored_bytes(self, module: str) -> int:
        """The size of a weight on disk, including scales, zero points and other tensors."""
        infos = [self._checkpoint.info(name) for name in self.tensor_names(module)]
        return sum(info.stop - info.start for info in infos)

    def _how(self, module: str) -> Reading:
        """How to read a packed module."""
        reading = self._reading(module)
        if reading is None:
            raise FormatError(f"{module} is packed, but config.json declares it as not quantized")
        return reading

    def _stored(self, module: str) -> dict[str, str]:
        """Suffix -> name, for the tensors that store the weight of a module."""
        reading = self._reading(module)
        suffixes = (*self._layout.suffixes, *(["weight"] if reading is not None and reading.in_place else []))
        names = {suffix: formats.tensor_name(module, suffix) for suffix in suffixes}
        return {suffix: name for suffix, name in names.items() if name in self._checkpoint}

    def _tensors(self, module: str) -> dict[str, Tensor]:
        return {suffix: self._checkpoint.tensor(name) for suffix, name in self._stored(module).items()}


def _reader(layout: Readable, settings: dict[str, Any]) -> Reader:
    """How to read packed modules.

    Writers list the layers that they kept in float by parts of names or by patterns, which sometimes also match packed
    layers. The tensors show that a module is packed, so such a list is ignored for packed modules.
    """
    declared = layout.read_config(settings)
    without_lists = {key: value for key, value in settings.items() if key not in layout.exclusions}
    anyway = layout.read_config(without_lists | {"lm_head": True})
    return lambda module: declared(module) or anyway(module)


def quantization_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The settings that declare how a checkpoint is quantized, or None for a float checkpoint.

    They are in config.json or in its part about the language model; older writers use a separate file.
    """
    config = checkpoint.config
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        settings = holder.get("quantization_config")
        if isinstance(settings, dict):
            return settings
        for layout in formats.readable():
            for key in layout.own_keys:
                if isinstance(holder.get(key), dict):
                    return {"quant_method": layout.quant_methods[0], **holder[key]}
    for layout in formats.readable():
        for name in layout.own_files:
            if (checkpoint.folder / name).is_file() and any(map(checkpoint.modules_with, layout.codes)):
                return {"quant_method": layout.quant_methods[0], **read_json_object(checkpoint.folder / name)}
    suffixes = {name.rpartition(".")[2] for name in checkpoint.names()}
    by_other = foreign.recognize(config, checkpoint.folder, suffixes)
    return None if by_other is None else {"quant_method": by_other.methods[0]}


def required_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a quantized checkpoint; raises FormatError for a float checkpoint."""
    settings = quantization_settings(checkpoint)
    if settings is None:
        raise FormatError(f"{checkpoint.folder} is not quantized: its config.json has no quantization_config")
    return settings


def shape_of(checkpoint: Checkpoint, packed: PackedWeights | None, module: str) -> tuple[int, ...]:
    """The shape of a weight, packed or not, without reading it."""
    name = f"{module}.weight"
    unpacked = packed is None or (name in checkpoint and not packed.is_packed(name))
    return checkpoint.info(name).shape if packed is None or unpacked else packed.shape(module)
