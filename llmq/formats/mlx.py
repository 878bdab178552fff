"""MLX, the format of mlx-lm on Apple's chips: affine grids with a real offset per group.

    weight   uint32 (N, K * bits / 32)   a row's codes as one stream of bits along K (`bit_packing.py`)
    scales   float (N, G)                groups of 32, 64 or 128 columns
    biases   float (N, G)                w = scales * q + biases

Codes are the quantized values q.  A grid of llmq is biases = -zero * scales.  In a symmetric grid the zero point is a
power of two, so the product is exact in the dtype of the scales.  Otherwise scales and biases are float32, in which the
product is exact too; it costs 4 bytes more per group, and MLX then computes in float32.

The settings are in `quantization` of config.json, which mlx-lm reads, and in `quantization_config`: `bits` and
`group_size`, and a block of both (or false) for each module that differs.  llmq adds the symmetry.

Files of other writers have offsets that are not multiples of the scale.  They are read as floats.

Not covered: the modes mxfp4, mxfp8 and nvfp4.

Source: github.com/ml-explore/mlx, python/mlx/nn/layers/quantized.py; github.com/ml-explore/mlx-lm, mlx_lm/utils.py.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.base import Layout, Reader, Reading
from llmq.formats.codecs import bit_packing, checks
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

NAME = "mlx"
GROUPS = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)
GLOBAL = frozenset({"quant_method", "group_size", "bits", "mode", "symmetric", "other_symmetry"})
"""Keys of the settings that are not names of modules."""


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """See `Layout.pack`."""
    checks.require_packable(q, refusal(q.scheme, *q.shape))
    if q.zeros is None:
        scales, zeros = q.scales, torch.full((1, 1), q.scheme.middle, dtype=torch.int16, device=q.scales.device)
    else:
        scales, zeros = q.scales.to(torch.float32), q.zeros
    exact = scales.double() * -zeros.double()
    biases = exact.to(scales.dtype)
    if not torch.equal(biases.double(), exact):
        raise FormatError(
            f"scale times zero point is not exact in {str(scales.dtype).removeprefix('torch.')}, in which MLX adds it",
            hint="use a symmetric grid, or scales in float16 or bfloat16",
        )
    words = bit_packing.pack(q.codes, q.scheme.bits)
    return {"weight": words.view(torch.uint32), "scales": scales.contiguous(), "biases": biases.contiguous()}


def unpack(tensors: Mapping[str, Tensor], reading: Reading) -> QuantizedTensor:
    """See `Layout.unpack`."""
    codes, scales, biases = _parts(tensors, reading)
    steps, offsets = scales.double(), -biases.double()
    zeros = torch.where(steps == 0, reading.scheme.middle, offsets / steps)
    whole = zeros.round().clamp(0, reading.scheme.levels)
    if not torch.equal(whole * steps, offsets):
        raise FormatError(f"biases hold offsets that are not multiples 0 to {reading.scheme.levels} of the scales")
    if not reading.symmetric:
        narrow = (scales.to(dtype) for dtype in (torch.bfloat16, torch.float16))
        scales = next((halves for halves in narrow if torch.equal(halves.to(scales.dtype), scales)), scales)
    elif bool((whole == reading.scheme.middle).all()):
        return checks.affine(codes, scales, None, reading)
    return checks.affine(codes, scales, whole.to(torch.int16), reading)


def decode(tensors: Mapping[str, Tensor], reading: Reading) -> Tensor:
    """(N, K) float32 of a weight with any offsets."""
    codes, scales, biases = _parts(tensors, reading)
    size = codes.shape[1] // scales.shape[1]
    spread = [part.to(torch.float32).repeat_interleave(size, dim=1) for part in (scales, biases)]
    return codes.to(torch.float32) * spread[0] + spread[1]


def _parts(tensors: Mapping[str, Tensor], reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 (N, K), scales and biases (N, G)."""
    words = checks.stored(tensors, "weight", (torch.uint32,), (None, None))
    N, K = words.shape[0], words.shape[1] * 32 // reading.bits
    G = checks.groups_of(reading, K)
    scales, biases = (checks.stored(tensors, name, checks.SCALE_DTYPES, (N, G)) for name in ("scales", "biases"))
    return bit_packing.unpack(words.view(torch.int32), reading.bits, K), scales, biases


def weight_shape(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, read: Callable[[str], Tensor]
) -> tuple[int, int]:
    """See `Layout.weight_shape`."""
    N, words = shapes["weight"]
    return N, words * 32 // reading.bits


def refusal(scheme: WeightScheme, out_features: int, in_features: int) -> str | None:
    """See `Layout.refusal`."""
    if (reason := checks.floats_refusal(scheme, NAME)) is not None:
        return reason
    if scheme.bits not in BITS:
        return f"mlx holds 2, 3, 4, 5, 6 and 8 bits, not {scheme.bits}; compressed-tensors holds 2 to 8"
    if scheme.group_size not in GROUPS:
        return f"mlx holds groups of 32, 64 and 128, not {scheme.group_size}; compressed-tensors holds any"
    return checks.grouping_refusal(scheme, in_features)


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """See `Layout.scale_dtype`: with 11 digits or fewer, the product with a zero point is exact in float32."""
    return torch.float16 if model_dtype is torch.float32 else model_dtype


def quantization_config(schemes: Mapping[str, WeightScheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """See `Layout.quantization_config`."""
    stored = checks.as_stored(schemes)
    usual = Counter((scheme.bits, scheme.group_size) for scheme in stored.values()).most_common(1)[0][0]
    symmetric = Counter(scheme.symmetric for scheme in stored.values()).most_common(1)[0][0]
    return {
        "quant_method": NAME,
        "bits": usual[0],
        "group_size": usual[1],
        "mode": "affine",
        "symmetric": symmetric,
        "other_symmetry": [name for name, scheme in stored.items() if scheme.symmetric != symmetric],
        **{
            name: {"bits": scheme.bits, "group_size": scheme.group_size}
            for name, scheme in stored.items()
            if (scheme.bits, scheme.group_size) != usual
        },
        **dict.fromkeys(unquantized, False),
    }


def read_config(config: Mapping[str, Any]) -> Reader:
    """See `Readable.read_config`."""
    symmetric = config.get("symmetric")
    others = checks.names_in(config.get("other_symmetry"), "other_symmetry")
    _reading(config, symmetric)  # a mistake in the settings of most modules is an error, even if no module is read

    def read(module: str) -> Reading | None:
        block = config.get(module, {}) if module not in GLOBAL else {}
        if block is False:
            return None
        changes = {} if block is True else checks.mapping(block, module)
        return _reading({**config, **changes}, symmetric if module not in others else not symmetric)

    return read


def _reading(settings: Mapping[str, Any], symmetric: bool | None) -> Reading:
    """How a module with these settings is read; `symmetric` is None where llmq has not written the file."""
    if (mode := settings.get("mode", "affine")) != "affine":
        raise FormatError(f"the checkpoint declares MLX's mode {mode!r}, expected affine")
    bits, group_size = (checks.declared(settings, key) for key in ("bits", "group_size"))
    if group_size not in GROUPS:
        raise FormatError(f"the checkpoint declares groups of {group_size!r}, expected one of {GROUPS}")
    reading = checks.declared_grid(bits, group_size, bool(symmetric), BITS)
    if symmetric is not None:
        return _in_place(reading)
    floats = _in_place(reading)
    return _in_place(reading, lambda tensors: decode(tensors, floats))


def _in_place(reading: Reading, decoder: Callable[[Mapping[str, Tensor]], Tensor] | None = None) -> Reading:
    return Reading(reading.scheme, in_place=True, decode=decoder)


LAYOUT = Layout(
    name=NAME,
    suffixes=("scales", "biases"),
    codes=("scales",),
    pack=pack,
    unpack=unpack,
    weight_shape=weight_shape,
    refusal=refusal,
    scale_dtype=scale_dtype,
    quantization_config=quantization_config,
    read_config=read_config,
    quant_methods=(NAME,),
    implied_by=("mode", "group_size"),
    own_keys=("quantization",),
    config_keys=("quantization", "quantization_config"),
    any_scale_dtype=True,
)
