"""The list of quantization settings: `QuantConfig` and its tables.

Each setting is one field: its type, its default, and a description that `--help` shows. TOML keys, command-line flags,
Python keywords and error messages are derived from the fields (`setting_fields.py`, `cli/options.py`), so a new
setting is one new field here. Nothing here imports torch, so `llmq --help` is fast.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from llmq import formats
from llmq.calibration_settings import Calibration
from llmq.errors import ConfigError, listed
from llmq.methods import METHODS, Method
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.numerics.named_schemes import WEIGHTS, with_preset
from llmq.numerics.scheme import ACTIVATIONS, BITS, FLOAT_GRIDS, GROUP_SIZES, GroupSize, InputScheme, WeightScheme
from llmq.patterns import matches, require_pattern
from llmq.setting_fields import Setting, Settings, Strings, parse_number

CONVERTIBLE = formats.names()  # they share their quantized values
FORMATS = (*CONVERTIBLE, *GGUF_GRIDS)
PRESETS = ("moe", *WEIGHTS)  # see mixed_precision/preset.py


def parse_overrides(given: Any) -> Any:
    """One override or several, as text or as `Override`."""
    overrides = [given] if isinstance(given, str | Override) else given
    return [parse_override(override) if isinstance(override, str) else override for override in overrides]


def parse_override(text: str) -> "Override":
    """`PATTERN:bits=8,group_size=32,symmetric=false` as the command line spells an override."""
    pattern, separator, assignments = text.rpartition(":")
    if not separator or not pattern or "=" not in assignments:
        raise ConfigError(
            f"invalid override {text!r}, expected PATTERN:KEY=VALUE",
            hint="for example '*.down_proj:bits=8,group_size=32'",
        )
    fields: dict[str, Any] = {"pattern": pattern}
    for assignment in assignments.split(","):
        key, _, value = (part.strip() for part in assignment.partition("="))
        fields[key] = {"true": True, "false": False}.get(value.lower(), int(value) if value.isdecimal() else value)
    return Override(**fields)


def parse_formats(given: Any) -> Any:
    """`gptq`, `gptq,gguf` or a list of such texts, as the name of one format or a tuple of several without repeats."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return given  # the field rejects the type
    names = tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("no format is given", hint=f"known are {listed(FORMATS)}")
    return names if len(names) > 1 else names[0]  # equal settings compare equal


Bits = Setting(choices=(*BITS, *FLOAT_GRIDS))
Size = Setting(choices=(*GROUP_SIZES, "channel", "tensor"), metavar="SIZE")
Inputs = Setting(choices=tuple(ACTIVATIONS))


class SchemeSettings(Settings):
    """The table [scheme]: how weights are quantized, unless an override says otherwise."""

    KEY: ClassVar[str] = "key of [scheme]"

    bits: Annotated[int | str, BeforeValidator(parse_number), Bits] = Field(
        default=WeightScheme().bits,
        description="Bits per weight. Use 5, 6 or 8 if 4 loses too much quality, 3 or 2 only to fit into memory. nvfp4 "
        "and mxfp4 are floats of 4 bits in groups of 16 and 32, fp8 of 8 bits with one scale per row, fp8-block with "
        "one per 128 x 128 (format compressed-tensors).",
    )
    group_size: Annotated[GroupSize, BeforeValidator(parse_number), Size] = Field(
        default=WeightScheme().group_size,
        description="Weights of a row that share a scale: 16, 32, 64, 128, 256, 512 or 1024; channel (one per row) or "
        "tensor (one in all). Smaller groups lose less quality; 32 takes about 0.4 bits per weight more than 128.",
    )
    symmetric: Annotated[bool, Setting(flag="--symmetric/--asymmetric")] = Field(
        default=WeightScheme().symmetric,
        description="Symmetric (fixed zero point) or asymmetric (one zero point per group). Try asymmetric for 2 or 3 "
        "bits; --dry-run shows which engines support it.",
    )

    def scheme(self) -> WeightScheme:
        if isinstance(self.bits, int):
            return WeightScheme(**dict(self))
        given = {key: getattr(self, key) for key in self.model_fields_set - {"bits"}}
        return WeightScheme.of_floats(self.bits, **given)


class Override(Settings):
    """Other settings for the layers whose name matches `pattern`; None keeps the setting of the run."""

    KEY: ClassVar[str] = "key of an override"

    pattern: str = Field(description="give the layers that the override is for, such as pattern = '*.down_proj'")
    bits: Annotated[int | str | None, BeforeValidator(parse_number), Bits] = None
    group_size: Annotated[GroupSize | None, BeforeValidator(parse_number), Size] = None
    symmetric: bool | None = None
    activations: Annotated[str | None, Inputs] = None

    def applied_to(self, scheme: WeightScheme) -> WeightScheme:
        changes = self.model_dump(include={"bits", "group_size", "symmetric"}, exclude_none=True)
        if isinstance(self.bits, str):
            return WeightScheme.of_floats(changes.pop("bits"), **changes)
        return dataclasses.replace(WeightScheme() if scheme.floats and self.bits else scheme, **changes)


class QuantConfig(Settings):
    """The settings of one run: the same object for flags, TOML and Python.

    `format` is one name or several (see `steps/separate_grids.py` for grids of llama.cpp); `formats` is always a tuple.
    """

    method: Annotated[str, Setting(choices=tuple(METHODS))] = Field(
        default="balanced",
        description="Quantization method. fast, balanced and best are GPTQ with further stages, each kept only where "
        "it lowers the error on validation text. Use fast for a first try, best if quality matters more than time, rtn "
        "if there is no text; gptq and awq are the published methods.",
    )
    scheme: Annotated[WeightScheme, Setting(table=SchemeSettings)] = WeightScheme()
    target_bits: Annotated[float | None, Setting(expected="bits per weight on average, such as 4.5")] = Field(
        default=None, gt=1, allow_inf_nan=False,
        description="Average bits per weight, including scales (e.g. 4.5). Layers are measured, and each gets 4 bits "
        "(group 128 or 32), 8 bits, the grid of --bits and --group-size, or float, whichever helps most.",
    )  # fmt: skip
    preset: Annotated[str | None, Setting(choices=PRESETS)] = Field(
        default=None,
        description="Settings by a name. w8a8: 8 bits, one scale per row, with --activations int8. w4a8: 4 bits with "
        "--activations int8. fp8, nvfp4: this grid for --bits and --activations. moe, for mixtures: 8 bits for what "
        "every token uses, --bits for routed experts; it adds overrides (--dry-run), your --override and --skip win.",
    )
    activations: Annotated[str, Inputs] = Field(
        default="none",
        description="Quantize the inputs of the quantized layers as well, for engines with 8-bit products. int8 and "
        "fp8 have one scale per token, and lose little. int8:static and fp8:static have one scale per layer, from the "
        "calibration text, and lose more. Use int8 with --bits 8 --group-size channel (W8A8) or --bits 4, fp8 with "
        "--bits fp8 or --bits 4, nvfp4 with --bits nvfp4; format compressed-tensors.",
    )
    format: Annotated[
        str | Strings, BeforeValidator(parse_formats), Setting(choices=FORMATS, metavar="FORMAT")
    ] = Field(
        default="compressed-tensors",
        description=f"File format: {listed(FORMATS)}. Several, also separated by commas, share the same quantized "
        "values, each in a separate folder; each gguf:NAME next to others is a further run. Choose by engine: "
        "--dry-run shows which engines load the result.",
    )  # fmt: skip
    skip: Annotated[Strings, Setting(metavar="PATTERN")] = Field(
        default=(),
        description=r"Layers to keep in float: 'down_proj', 'layers.0.*', 're:layers\.0\.'. Use it for layers with a "
        "large error.",
    )
    overrides: Annotated[
        tuple[Override, ...],
        Setting(
            flag="--override", metavar="PATTERN:KEY=VALUE", parse=parse_overrides, expected="a list of tables",
            keyword="str | Override | Sequence[str | Override | Mapping[str, Any]]",
        ),
    ] = Field(
        default=(), strict=False,
        description="Other bits, group size or activations for some layers: 'PATTERN:bits=8,group_size=32', "
        "'PATTERN:activations=none'. The last match wins.",
    )  # fmt: skip
    strict: bool = Field(
        default=False,
        description="Error out if the group size does not divide a layer's input size (default: use a smaller one).",
    )
    order: Literal["activation", "natural"] = Field(
        default="activation",
        description="Column order for GPTQ: activation (act-order) or natural. Use natural only to reproduce other "
        "results.",
    )
    scales: Literal["searched", "minmax"] = Field(
        default="searched",
        description="How scales are chosen: searched (least squared error) or minmax. minmax is faster and less "
        "accurate; use it to compare with other tools.",
    )
    damping: Annotated[float, Setting(expected="a fraction of the Hessian's mean diagonal, such as 0.01")] = Field(
        default=0.01, gt=0, lt=1,
        description="Added to the diagonal of GPTQ's Hessian, as a fraction of its mean. Raise it to 0.05 if there is "
        "little calibration text.",
    )  # fmt: skip
    keep_grid: Annotated[bool, Setting(flag="--keep-grid/--no-keep-grid")] = Field(
        default=True,
        description="Store weights that already lie on a grid, because they were trained for it or dequantized, on "
        "that grid without a second rounding, wherever the format can hold it. --dry-run shows which layers these are.",
    )
    rotate: bool = Field(
        default=False,
        description="Rotate the channels of each attention head to remove outliers. Each block keeps its rotation only "
        "if that lowers the error on validation text, so it is safe to try.",
    )
    quantize_head: bool = Field(
        default=False,
        description="Quantize the output head as well (formats gptq and compressed-tensors). A head that is tied to "
        "the embedding gets a separate weight. Use it for small models with a large vocabulary.",
    )
    calibration: Calibration = Calibration()
    seed: Annotated[int, Setting(panel="Calibration", expected="a whole number from 0 to 2**63 - 1")] = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Random seed for the choice of text. Change it to see how much results vary between runs.",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        return with_preset(given) if isinstance(given, Mapping) else given

    @field_validator("scheme", mode="before")
    @classmethod
    def _scheme_from_table(cls, given: Any) -> Any:
        return SchemeSettings(**given).scheme() if isinstance(given, Mapping) else given

    @field_serializer("scheme")
    def _scheme_to_table(self, scheme: WeightScheme) -> dict[str, Any]:
        if scheme.floats is not None:
            return {"bits": scheme.floats}
        return {key: getattr(scheme, key) for key in SchemeSettings.model_fields}

    @model_validator(mode="after")
    def _require_compatible(self) -> Self:
        for override in self.overrides:
            override.applied_to(self.scheme)  # raises ConfigError for an invalid scheme
        for pattern in (*self.skip, *(override.pattern for override in self.overrides)):
            require_pattern(pattern)
        return self

    @property
    def input_schemes(self) -> set[InputScheme | None]:
        """How the inputs of layers are quantized, of all layers together; None for float inputs."""
        names = (self.activations, *(override.activations for override in self.overrides))
        return {ACTIVATIONS[name] for name in names if name is not None}

    @property
    def static_inputs(self) -> bool:
        """Whether inputs of layers have static scales."""
        return any(inputs is not None and inputs.scales == "static" for inputs in self.input_schemes)

    @property
    def formats(self) -> tuple[str, ...]:
        return (self.format,) if isinstance(self.format, str) else self.format

    @property
    def stages(self) -> Method:
        method = METHODS[self.method].rotated() if self.rotate else METHODS[self.method]
        if not self.calibration.own_text or (method.given < 1 and self.calibration.names_self):
            method = method.with_given_text_only()
        integers = any(inputs is not None and inputs.dtype == "int8" for inputs in self.input_schemes)
        return method.smoothed() if self.static_inputs or (integers and method.needs_calibration) else method

    def without_validation(self) -> Self:
        """The settings that decide about the bytes of the model."""
        return self.replace(calibration=self.calibration.replace(validation=None))

    def scheme_for(self, module: str) -> WeightScheme | None:
        """The scheme for a module, or None where a skip pattern matches; the last matching override wins."""
        if any(matches(pattern, module) for pattern in self.skip):
            return None
        scheme = self.scheme
        for override in self.overrides:
            if matches(override.pattern, module):
                scheme = override.applied_to(scheme)
        return scheme

    def inputs_for(self, module: str) -> InputScheme | None:
        """How the inputs of a module are quantized, or None; the last matching override wins."""
        name = self.activations
        for override in self.overrides:
            if override.activations is not None and matches(override.pattern, module):
                name = override.activations
        return ACTIVATIONS[name]
