"""The formats of `--format` as one layout, in which a run quantizes and stages its blocks.

A single safetensors format is its own layout. Several formats share the quantized values, so they share everything that
determines these: a scheme is refused if one of the formats refuses it, and scales are rounded to values that all of
them hold exactly. The blocks are staged in the first format; the others are converted from it at the end
(`export/convert.py`). A .gguf file is always converted, unless its block types have a separate grid.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.side_files import refuse_outside
from llmq.config import QuantConfig
from llmq.errors import ConfigError, UnsupportedModelError
from llmq.formats.base import Layout, Reading
from llmq.formats.codecs.checks import is_head
from llmq.gguf import export
from llmq.gguf.metadata import add_sizes
from llmq.gguf.names import Names
from llmq.gguf.supported import architecture, language_config
from llmq.gguf.tokenizer import add_tokenizer
from llmq.model.build import skeleton
from llmq.numerics.affine_grid import SMALLEST_SCALE, Bounded, ScaleDtype, dtype_of
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import InputScheme, WeightScheme

STAGED_FOR_GGUF = "compressed-tensors"  # it holds every scheme
INPUTS_IN = "compressed-tensors"  # the format with a place for quantized inputs
ONLY_INPUTS = "int-quantized"  # the format for quantized inputs alone
USUAL = f"give --format {INPUTS_IN}"
GGUF_SCALES = torch.float16
IN_GGUF = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "chat_template.json")


def default_output(model: str, settings: QuantConfig) -> Path:
    """`llama-gptq-4bit` in the current folder, for a model whose name or folder is `llama`."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    bits = settings.scheme.bits if settings.target_bits is None else settings.target_bits
    grid = f"{bits:g}bit" if settings.scheme.floats is None or settings.target_bits else settings.scheme.floats
    return Path(f"{name}-{settings.method}-{grid}")


def staged_format(names: Sequence[str]) -> str:
    """The first safetensors format of `names`, in which the blocks of a run are staged."""
    return next((name for name in names if name != GGUF), STAGED_FOR_GGUF)


def layout_of(names: Sequence[str], model_dtype: torch.dtype) -> Layout:
    """The layout of a run with these formats."""
    if len(names) == 1 and names[0] != GGUF:
        return single(names[0])
    return _together(names, model_dtype)


def single(name: str) -> Layout:
    """The layout of one format of `llmq.config.FORMATS`."""
    return formats.load(GGUF if name in GGUF_GRIDS else name)


def _together(names: Sequence[str], model_dtype: torch.dtype) -> Layout:
    """Several formats as one layout: it packs like the first, and holds only what all of them can hold."""
    first = single(staged_format(names))
    others = [single(name) for name in names if name not in (GGUF, staged_format(names))]
    published = [first, *others] if staged_format(names) in names else []
    dtypes = [layout.scale_dtype(model_dtype) for layout in published]
    values = common_values([*dtypes, *([GGUF_SCALES] if GGUF in names else [])])
    stored = first.scale_dtype(model_dtype) if published else dtype_of(values)

    def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
        """Scales get the dtype to which they were rounded, so that tuning rounds them to the same dtype."""
        return _with_scales(first.unpack(tensors, reading), dtype_of(values))

    def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
        for layout in (first, *others):
            if (reason := layout.refusal(scheme, out_features, in_features)) is not None:
                return reason
        return gguf_refusal(scheme, in_features) if GGUF in names else None

    def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
        """That of the first format; raises ConfigError if one of the formats cannot hold these schemes together."""
        for layout in others:
            layout.quantization_config(schemes, unquantized)
        return first.quantization_config(schemes, unquantized)

    return dataclasses.replace(
        first,
        name=" with ".join(names),
        pack=lambda q: first.pack(_with_scales(q, stored)),
        pack_like=None,
        with_inputs=None,
        unpack=unpack,
        refusal=refusal,
        scale_dtype=lambda model_dtype: stored,
        quantization_config=quantization_config,
        scale_values=values,
        one_grid=any(layout.one_grid for layout in (first, *others)),
        holds_head=all(layout.holds_head for layout in (first, *others)),
        any_scale_dtype=False,
    )


def scale_values(layout: Layout, model_dtype: torch.dtype) -> ScaleDtype:
    """The values to which scales are rounded, for a layout of `layout_of`."""
    return layout.scale_dtype(model_dtype) if layout.scale_values is None else layout.scale_values


def common_values(dtypes: Sequence[torch.dtype]) -> ScaleDtype:
    """The scales that all of these dtypes hold exactly.

    A bfloat16 has fewer digits than a float16, so float16 holds it exactly unless it is too small.
    """
    by_digits = sorted(set(dtypes), key=lambda dtype: -torch.finfo(dtype).eps)
    least = max(SMALLEST_SCALE.get(dtype, 0.0) for dtype in by_digits)
    if len(by_digits) > 1 and least > SMALLEST_SCALE.get(by_digits[0], 0.0):
        return Bounded(by_digits[0], least)
    return by_digits[0]


def gguf_refusal(scheme: WeightScheme, in_features: int) -> str | None:
    """Why no GGUF block type holds these quantized values exactly for a weight with `in_features` inputs, or None."""
    if export.best(scheme, in_features) is not None:
        return None
    return "; ".join(dict.fromkeys(filter(None, (export.refusal(kind, scheme, in_features) for kind in export.EXACT))))


def require_writable(names: Sequence[str], checkpoint: Checkpoint, tensors: Iterable[str]) -> None:
    """Raise if no .gguf file can be written for this model because of its architecture, tokenizer or tensors.

    `tensors` are the names of its tensors before packing. Sizes and tokenizer are checked with a writer that writes no
    file.
    """
    if not any(name.startswith(GGUF) for name in names):
        return
    import gguf

    refuse_outside(checkpoint.folder, IN_GGUF)
    config = language_config(skeleton.load_config(checkpoint.folder, remote_code=False).to_dict())
    arch = architecture(config)
    places = Names(arch, config)
    unknown = [
        name
        for name in tensors
        if not _stacked(checkpoint, name) and not places.is_left_out(name) and places.place(name) is None
    ]
    if unknown:
        raise UnsupportedModelError(
            f"llama.cpp's architecture {arch.name} has no tensor for {unknown[0]} ({len(unknown)} in all)",
            hint="use a safetensors format: they hold any model",
        )
    writer = gguf.GGUFWriter(None, arch.name)
    add_sizes(writer, config, arch)
    add_tokenizer(writer, checkpoint.folder, config, int(config["vocab_size"]))


def _stacked(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds all experts of a layer; in the output each expert has a name."""
    return name in checkpoint and len(checkpoint.info(name).shape) > 2


def require_folder_name(out: Path) -> None:
    """Raise ConfigError for an output with the suffix .gguf: the output of every format is a folder."""
    if out.suffix == ".gguf":
        raise ConfigError(
            f"the output {out} is named like a file, expected the name of a folder",
            hint=f"give {out.with_suffix('')}: the .gguf file in it is named after the folder",
        )


def require_head(settings: QuantConfig) -> None:
    """Raise ConfigError if --quantize-head is set and a format of the run cannot hold a quantized head."""
    if not settings.quantize_head:
        return
    for name in settings.formats:
        if name in GGUF_GRIDS:
            raise ConfigError(
                f"{name} chooses a block type for the head itself, so --quantize-head has no effect",
                hint="leave --quantize-head out",
            )
        if not single(name).holds_head:
            raise ConfigError(
                f"{name} cannot hold a quantized head: its readers expect a float head",
                hint=f"give --format {' or '.join(_with_head())}, or leave --quantize-head out",
            )


def require_inputs(settings: QuantConfig) -> None:
    """Raise ConfigError if inputs are quantized and a format or the method of the run cannot do this."""
    if ONLY_INPUTS in settings.formats and not any(map(_are_integers, settings.input_schemes)):
        raise ConfigError(f"{ONLY_INPUTS} is for int8 inputs", hint=f"add --activations int8, or {USUAL}")
    if settings.input_schemes == {None}:
        return
    for name in settings.formats:
        if (reason := inputs_refusal(name)) is not None:
            raise ConfigError(reason, hint=f"give --format {INPUTS_IN}, or leave --activations out")
    measured = [str(inputs) for inputs in settings.input_schemes if inputs is not None and inputs.calibrated]
    if measured and not settings.stages.needs_calibration:
        raise ConfigError(
            f"the scales of inputs in {measured[0]} are measured on text, but the method {settings.method} reads none",
            hint="give --method fast and --calibration, or dynamic scales, such as --activations int8",
        )


def refuse_inputs(to: str, inputs: Iterable[InputScheme | None]) -> None:
    """Raise ConfigError if a format is made from a model with quantized inputs, and has no place for this."""
    reason, inputs = inputs_refusal(to), list(inputs)
    if to == ONLY_INPUTS and not any(map(_are_integers, inputs)):
        raise ConfigError(f"{to} is for int8 inputs, and the model has none", hint=f"use --to {INPUTS_IN}")
    if reason is not None and any(scheme is not None for scheme in inputs):
        raise ConfigError(
            f"the model has quantized inputs, and {reason}",
            hint=f"use --to {INPUTS_IN}, or quantize the original model without --activations",
        )


def _are_integers(inputs: InputScheme | None) -> bool:
    return inputs is not None and inputs.dtype == "int8"


def inputs_refusal(name: str) -> str | None:
    """Why a format has no place for quantized inputs, or None."""
    if name.startswith(GGUF):
        return f"{name} does not declare quantized inputs: llama.cpp rounds the inputs of all layers to 8 bits itself"
    if single(name).with_inputs is None:
        return f"{name} has no place for quantized inputs: its readers multiply inputs in 16 bits"
    return None


def refuse_packed_head(to: str, modules: Iterable[str]) -> None:
    """Raise ConfigError if a format is made from a model with a quantized head, and its readers expect a float head."""
    head = next((module for module in modules if is_head(module)), None)
    if head is not None and not single(to).holds_head:
        raise ConfigError(
            f"{to} cannot hold the quantized head {head}: readers of {to} files expect a float head",
            hint=f"use --to {' or '.join(_with_head())}, or quantize without --quantize-head",
        )


def _with_head() -> list[str]:
    return [name for name in formats.names() if formats.load(name).holds_head]


def _with_scales(q: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    return dataclasses.replace(q, scales=q.scales.to(dtype))
