"""Checkpoints of other tools that llmq does not read: how they are recognized, and what their owner can do.

A checkpoint names its tool in config.json, in a file next to it, or only by the names of its tensors.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORIGINAL = "start from the unquantized model"
FLOATS = f"{ORIGINAL}, or, if fp8 is in blocks of 128 x 128, make floats first: llmq convert MODEL FLOATS --to float"
DEQUANTIZE = f"{ORIGINAL}, or load this one in transformers with the package of its tool, and save model.dequantize()"


@dataclass(frozen=True)
class Foreign:
    """A format that llmq does not read.

    methods   values of `quant_method`, in lower case with hyphens; the first one is used in messages
    keys      keys of config.json, other than `quantization_config`
    files     files next to config.json
    suffixes  of tensors that no other format has
    """

    name: str
    methods: tuple[str, ...]
    keys: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    way_out: str = ORIGINAL


FORMATS = (
    Foreign("exllamav3", ("exl3",), suffixes=("trellis", "suh", "svh"), way_out=f"{ORIGINAL}; exllamav3 runs this one"),
    Foreign("exllamav2", ("exl2",), suffixes=("q_weight", "q_scale_max"), way_out=f"{ORIGINAL}; exllamav2 runs it"),
    Foreign("HQQ", ("hqq",), suffixes=("W_q",), way_out=DEQUANTIZE),
    Foreign("bitsandbytes", ("bitsandbytes",), suffixes=("SCB", "absmax", "quant_map"), way_out=DEQUANTIZE),
    Foreign("8-bit floats", ("fp8", "fbgemm-fp8"), suffixes=("weight_scale_inv",), way_out=FLOATS),
    Foreign("ModelOpt", ("modelopt", "modelopt-fp4"), files=("hf_quant_config.json",)),
    Foreign("QuIP#", ("quip",), keys=("quip_params",), suffixes=("Qidxs",)),
    Foreign("AQLM", ("aqlm",), suffixes=("codebooks",)),
    Foreign("VPTQ", ("vptq",), suffixes=("centroids",)),
    Foreign("SpQR", ("spqr",)),
    Foreign("HIGGS", ("higgs",)),
    Foreign("EETQ", ("eetq",)),
    Foreign("Quark", ("quark",)),
    Foreign("BitNet", ("bitnet",)),
    Foreign("FP-Quant", ("fp-quant",)),
    Foreign("SINQ", ("sinq",)),
    Foreign("quanto", ("quanto",), files=("quanto_qmap.json",), way_out=DEQUANTIZE),
    Foreign("torchao", ("torchao",), way_out=DEQUANTIZE),
)


def recognize(config: Mapping[str, Any], folder: Path, suffixes: Collection[str]) -> Foreign | None:
    """The tool of a checkpoint without `quantization_config`, by its config.json, folder and suffixes of tensors."""
    for foreign in FORMATS:
        by_key = any(isinstance(config.get(key), Mapping) for key in foreign.keys)
        if by_key or any((folder / name).is_file() for name in foreign.files) or {*foreign.suffixes} & {*suffixes}:
            return foreign
    return None


def of_block(quantization_config: Mapping[str, Any]) -> Foreign | None:
    """The tool that wrote a block `quantization_config`."""
    method = quantization_config.get("quant_method")
    plain = method.lower().replace("_", "-") if isinstance(method, str) else None
    return next((foreign for foreign in FORMATS if plain in foreign.methods), None)
