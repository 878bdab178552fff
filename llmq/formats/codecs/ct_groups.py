"""The groups in the configuration of compressed-tensors, and quantized inputs, which they declare.

    input_activations                                               weights of 8 bits         weights of fewer bits
    num_bits 8, strategy token, dynamic                             int-quantized             pack-quantized
    num_bits 8, strategy tensor, and a tensor input_scale (1,)      weight int8 (N, K)        weight_packed …

These are inputs in int8.  The type of inputs in fp8 is float; their weights are stored as those with float inputs, and
so are those with inputs in nvfp4, which have num_bits 4, strategy tensor_group, group_size 16, dynamic "local", and a
tensor input_global_scale float32 (1,).

A group with quantized inputs has the key `format`.  Without it, readers infer the format from the two schemes, and take
packed words of 4 bits for bytes (observed with compressed-tensors 0.20).  The format of a file with different groups is
`mixed-precision`.  Without quantized inputs, groups have only keys that every version of the format knows, because
several readers refuse groups with unknown keys.

Not covered: asymmetric inputs, inputs of other bits, quantized outputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from llmq.errors import FormatError
from llmq.formats.codecs import checks, ct_floats, fp4
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import INPUT_SCALES, InputScheme, Scheme, WeightScheme

NAME = "compressed-tensors"
WORDS, BYTES, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
SCALE, GLOBAL = "input_scale", "input_global_scale"
LOCAL_KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size")  # of inputs in nvfp4


def refusal(scheme: Scheme) -> str | None:
    """See `QuantizedInputs.refusal`."""
    weights, inputs = scheme.weights, scheme.inputs
    if weights is None or inputs is None:
        return None
    if not weights.symmetric:
        return f"no engine multiplies inputs in {inputs.dtype} by weights with zero points: use --symmetric"
    if "nvfp4" in (inputs.dtype, weights.floats) and inputs.dtype != weights.floats:
        return f"no engine multiplies inputs in {inputs.dtype} by weights in {weights}: use nvfp4 for both, or for none"
    if inputs.dtype == "int8":
        if weights.floats is not None:
            return f"no engine multiplies int8 inputs by {weights.floats}: use --bits 4 or 8"
        if weights.bits == 8 and isinstance(weights.group_size, int):
            return "no engine multiplies int8 inputs by weights of 8 bits in groups: use --group-size channel"
        return None
    if weights.floats in ("fp8", "nvfp4"):
        return None
    if weights.floats or (weights.bits, weights.group_size) != (4, 128):
        return f"fp8 inputs need weights in fp8, or in 4 bits with --group-size 128, not {weights}"
    if inputs.scales == "static":
        return f"engines multiply fp8 inputs by {weights} with dynamic scales only: use --activations fp8"
    return None


def packing_of(scheme: Scheme, *, as_bytes: bool = False) -> str:
    """The format of the weights of a group.  Engines with 8-bit products read bytes, all others words.

    `as_bytes` is whether weights of fewer bits with int8 inputs are bytes, too (`int_quantized.py`).
    """
    assert scheme.weights is not None, "a group has quantized weights"
    if scheme.weights.floats is not None:
        return ct_floats.packing_of(scheme.weights)
    integers = scheme.inputs is not None and scheme.inputs.dtype == "int8"
    return BYTES if integers and (as_bytes or scheme.weights.bits == 8) else WORDS


def quantization_config(
    schemes: Mapping[str, Scheme], unquantized: Sequence[str], *, as_bytes: bool = False
) -> dict[str, Any]:
    """See `QuantizedInputs.quantization_config`, and `packing_of` for `as_bytes`."""
    grids = checks.as_stored({name: scheme.weights for name, scheme in schemes.items() if scheme.weights is not None})
    modules: dict[Scheme, list[str]] = {}
    for name, grid in grids.items():
        inputs = schemes[name].inputs
        modules.setdefault(Scheme(grid, None if inputs is None else inputs.declared), []).append(name)
    packings = {scheme: packing_of(scheme, as_bytes=as_bytes) for scheme in modules}
    mixed = len(set(packings.values())) > 1
    named = mixed or any(scheme.inputs is not None for scheme in modules)  # otherwise groups have the file's format
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(modules) == 1 else targets,
            **({"format": packings[scheme]} if named else {}),
            "weights": weights_block(scheme.weights),
            "input_activations": inputs_block(scheme.inputs),
            "output_activations": None,
        }
        for i, (scheme, targets) in enumerate(modules.items())
        if scheme.weights is not None
    }
    return {
        "quant_method": NAME,
        "format": MIXED if mixed else next(iter(packings.values())),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }


def weights_block(scheme: WeightScheme) -> dict[str, Any]:
    """The block `weights` of a group."""
    if scheme.floats is not None:
        return ct_floats.weights_block(scheme)
    grouped = isinstance(scheme.group_size, int)
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }


def inputs_block(inputs: InputScheme | None) -> dict[str, Any] | None:
    """The block `input_activations`; None for float inputs."""
    if inputs is None:
        return None
    if inputs.dtype == "nvfp4":
        return {**fp4.weights_block(WeightScheme.of_floats("nvfp4")), "dynamic": "local"}
    dynamic = inputs.scales == "dynamic"
    return {
        "num_bits": 8,
        "type": "int" if inputs.dtype == "int8" else "float",
        "symmetric": True,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
        "group_size": None,
        "actorder": None,
    }


def read_inputs(declared: Any, packing: object) -> InputScheme | None:
    """The scheme that a block `input_activations` declares; None for one that llmq does not compute.

    packing  the format of the weights of the group; only those in nvfp4 have inputs in nvfp4
    """
    given = checks.mapping(declared, "input_activations")
    kind = given.get("type", "int")
    if given.get("dynamic") == "local":
        local, weights = InputScheme("nvfp4", "local"), WeightScheme.of_floats("nvfp4")
        expected = ct_floats.weights_block(weights)
        fits = packing == ct_floats.packing_of(weights) and all(given.get(key) == expected[key] for key in LOCAL_KEYS)
        return local if fits else None
    if given.get("num_bits") != 8 or given.get("symmetric", True) is not True or kind not in ("int", "float"):
        return None
    dtype: Literal["int8", "fp8"] = "int8" if kind == "int" else "fp8"
    if given.get("dynamic", False) is True:
        return InputScheme(dtype, "dynamic") if given.get("strategy") == "token" else None
    return InputScheme(dtype, "static") if given.get("strategy") == "tensor" else None


def pack_bytes(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight with one signed byte per code and per zero point."""

    def signed(unsigned: Tensor) -> Tensor:
        return (unsigned.to(torch.int16) - q.scheme.middle).to(torch.int8)

    tensors = {"weight": signed(q.codes), "weight_scale": q.scales.contiguous()}
    return tensors if q.zeros is None else {**tensors, "weight_zero_point": signed(q.zeros)}


def tensors_of(inputs: InputScheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of quantized inputs: the scale of static ones, in the dtype of the scales of the weight, or the
    global scale of nvfp4.

    Raises FormatError for inputs whose scale was not measured.
    """
    if inputs.calibrated and inputs.scale is None:
        dynamic = inputs.dtype if "dynamic" in INPUT_SCALES[inputs.dtype] else "none"
        raise FormatError(f"inputs in {inputs} have no scale, expected one", hint=f"use activations={dynamic}")
    if inputs.scale is None:
        return {}
    kept = (GLOBAL, torch.float32) if inputs.scales == "local" else (SCALE, dtype)
    return {kept[0]: torch.tensor([inputs.scale], dtype=kept[1])}


def needed(inputs: InputScheme | None) -> tuple[str, ...]:
    """The suffixes of the tensors of quantized inputs."""
    return () if inputs is None else {"dynamic": (), "static": (SCALE,), "local": (GLOBAL,)}[inputs.scales]


def stored_scale(tensors: Mapping[str, Tensor]) -> float:
    """The static or the global scale of the inputs of a module."""
    name = GLOBAL if GLOBAL in tensors else SCALE
    flat = {name: tensors[name].reshape(-1)} if name in tensors else {}
    return float(checks.stored(flat, name, checks.SCALE_DTYPES, (1,)))
