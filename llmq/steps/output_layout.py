"""What `--format` asks for, as the one layout that a run rounds for and stages its blocks in.

One format of safetensors is its own layout.  Several share the codes, so they share whatever decides these: a grid is
refused where one of them refuses it, and scales are rounded to values that all of them hold exactly.  The blocks are
staged in the first one; the others are made from it when it is finished (`export/convert.py`).  A .gguf file is
always made that way, unless it has a grid of its own.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import formats
from llmq.checkpoint.reader import Checkpoint
from llmq.config import CONVERTIBLE, QuantConfig
from llmq.errors import ConfigError, UnsupportedModelError
from llmq.formats.base import Layout, Reading
from llmq.formats.codecs.checks import is_head
from llmq.gguf import export
from llmq.gguf.architectures import architecture
from llmq.gguf.metadata import add_sizes
from llmq.gguf.names import Names
from llmq.gguf.tokenizer import add_tokenizer
from llmq.model.build import skeleton
from llmq.numerics.affine_grid import SMALLEST_SCALE, Bounded, ScaleDtype, dtype_of
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

STAGED_FOR_GGUF = "compressed-tensors"  # holds every grid
GGUF_SCALES = torch.float16


def staged_format(names: Sequence[str]) -> str:
    """The first of the formats that is one of safetensors, in which the blocks of a run are kept until it is over."""
    return next((name for name in names if name != GGUF), STAGED_FOR_GGUF)


def layout_of(names: Sequence[str], model_dtype: torch.dtype) -> Layout:
    """The layout that a run with these formats is rounded for."""
    if len(names) == 1 and names[0] != GGUF:
        return single(names[0])
    return _together(names, model_dtype)


def single(name: str) -> Layout:
    """The layout of one format of `llmq.config.FORMATS`."""
    return formats.load(GGUF if name in GGUF_GRIDS else name)


def _together(names: Sequence[str], model_dtype: torch.dtype) -> Layout:
    """Several formats as one layout: it packs as the first of them, and holds what all of them hold."""
    first = single(staged_format(names))
    others = [single(name) for name in names if name not in (GGUF, staged_format(names))]
    published = [first, *others] if staged_format(names) in names else []
    dtypes = [layout.scale_dtype(model_dtype) for layout in published]
    values = common_values([*dtypes, *([GGUF_SCALES] if GGUF in names else [])])
    stored = first.scale_dtype(model_dtype) if published else dtype_of(values)

    def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
        """Scales in the dtype that they were rounded to, so that what tunes them keeps to it."""
        return _with_scales(first.unpack(tensors, reading), dtype_of(values))

    def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
        for layout in (first, *others):
            if (reason := layout.refusal(scheme, out_features, in_features)) is not None:
                return reason
        return gguf_refusal(scheme, in_features) if GGUF in names else None

    def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
        """The first one's; raises ConfigError where one of them cannot hold these grids together."""
        for layout in others:
            layout.quantization_config(schemes, unquantized)
        return first.quantization_config(schemes, unquantized)

    return dataclasses.replace(
        first,
        name=" with ".join(names),
        pack=lambda q: first.pack(_with_scales(q, stored)),
        pack_like=None,
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
    """What scales are rounded to for a layout of `layout_of`."""
    return layout.scale_dtype(model_dtype) if layout.scale_values is None else layout.scale_values


def common_values(dtypes: Sequence[torch.dtype]) -> ScaleDtype:
    """The scales that all of these dtypes hold exactly.

    A bfloat16 has fewer digits than a float16, so float16 holds it exactly where it is not too small.
    """
    by_digits = sorted(set(dtypes), key=lambda dtype: -torch.finfo(dtype).eps)
    least = max(SMALLEST_SCALE.get(dtype, 0.0) for dtype in by_digits)
    if len(by_digits) > 1 and least > SMALLEST_SCALE.get(by_digits[0], 0.0):
        return Bounded(by_digits[0], least)
    return by_digits[0]


def gguf_refusal(scheme: WeightScheme, in_features: int) -> str | None:
    """Why no block type of GGUF holds these codes exactly for a weight with so many inputs, or None."""
    if export.best(scheme, in_features) is not None:
        return None
    return "; ".join(filter(None, (export.refusal(kind, scheme, in_features) for kind in export.EXACT)))


def require_writable(names: Sequence[str], checkpoint: Checkpoint, tensors: Iterable[str]) -> None:
    """Raise for a .gguf file that could not be written of this model: its architecture, tokenizer, or a tensor of it.

    `tensors` are the names that they have, or had before they were packed.  The rest is found out by a writer that
    writes nothing.
    """
    if not any(name.startswith(GGUF) for name in names):
        return
    import gguf

    config = skeleton.load_config(checkpoint.folder, remote_code=False).to_dict()
    arch = architecture(config)
    places = Names(arch.name, config["num_hidden_layers"])
    unknown = [
        name
        for name in tensors
        if not _stacked(checkpoint, name) and "rotary_emb" not in name and places.place(name) is None
    ]
    if unknown:
        raise UnsupportedModelError(
            f"llama.cpp's architecture {arch.name} has no tensor for {unknown[0]} ({len(unknown)} in all)",
            hint="the safetensors formats hold any model",
        )
    writer = gguf.GGUFWriter(None, arch.name)
    add_sizes(writer, config, arch)
    add_tokenizer(writer, checkpoint.folder, int(config["vocab_size"]))


def _stacked(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds all experts of a layer, which have names of their own in the end."""
    return name in checkpoint and len(checkpoint.info(name).shape) > 2


def require_known(name: str) -> None:
    """Raise ConfigError for what `llmq convert` cannot make."""
    if name not in CONVERTIBLE:
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(CONVERTIBLE)}")


def require_folder_name(out: Path) -> None:
    """Raise ConfigError for an output that is named like a file: every format is a folder."""
    if out.suffix == ".gguf":
        raise ConfigError(
            f"{out} is named like a file, and the output is a folder",
            hint=f"give {out.with_suffix('')}: a .gguf file in it is named after the folder",
        )


def require_head(settings: QuantConfig) -> None:
    """Raise ConfigError where a format of the run cannot hold the head that the user wants to quantize."""
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
                f"{name} cannot hold a head that is quantized on request: its readers expect a float head",
                hint=f"give --format {' or '.join(_with_head())}, or leave --quantize-head out",
            )


def refuse_packed_head(to: str, modules: Iterable[str]) -> None:
    """Raise ConfigError where a format would be made of a quantized head that its readers do not look for."""
    head = next((module for module in modules if is_head(module)), None)
    if head is not None and not single(to).holds_head:
        raise ConfigError(
            f"{to} cannot hold the quantized head {head}: readers of {to} files expect a float one",
            hint=f"use --to {' or '.join(_with_head())}, or quantize without --quantize-head",
        )


def _with_head() -> list[str]:
    return [name for name in formats.names() if formats.load(name).holds_head]


def _with_scales(q: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    return dataclasses.replace(q, scales=q.scales.to(dtype))
