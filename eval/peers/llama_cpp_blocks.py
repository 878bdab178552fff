"""Q4_0 and Q4_K_M by llama.cpp, with and without its importance matrix; the contract is in peer.py.

Its packages have no quantizer with a Python interface, but the library in xllamacpp has the C interface of ggml, which
quantizes here, tensor by tensor: blocks of 32 with a scale in fp16 (Q4_0, 4.5 bits per weight), or blocks of 32 in
superblocks of 256 with 6-bit scales and minima (Q4_K, 4.5 bits). The type of each tensor follows the rule of llama.cpp
for Q4_K_M: v and down in 6 bits in some of the layers. llama.cpp would also pack embedding and head, which are kept in
float here for all tools. The importance matrix is the mean square of each input over the calibration tokens in the
float model. No GGUF file is written, but the files have the same size: 16 bits for everything that stays in float.
"""

import argparse
import ctypes
import importlib.util
import re
from pathlib import Path
from typing import Any

from environment import SHARED, SHARED_REQUIREMENTS
from peer import main, windows

NAME, REQUIREMENTS, PACKAGE = SHARED, SHARED_REQUIREMENTS, "xllamacpp"
OPTIONS = [("--type", {"choices": ("Q4_0", "Q4_K_M"), "default": "Q4_K_M"}), ("--imatrix", {"action": "store_true"})]
TYPES = {"Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}  # enum ggml_type
BLOCK = {"Q4_0": 32, "Q5_0": 32, "Q8_0": 32, "Q4_K": 256, "Q6_K": 256}
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
FLOATS = ctypes.POINTER(ctypes.c_float)


def library() -> ctypes.CDLL:
    """The ggml library of xllamacpp, with the types of the functions that are called."""
    import xllamacpp  # noqa: F401  (loads the libraries that ggml needs)

    binding = importlib.util.find_spec("xllamacpp.xllamacpp")
    ggml = ctypes.CDLL(str(binding.origin))
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS
    ]  # fmt: skip
    return ggml


def kind(name: str, wanted: str, layers: int, columns: int) -> str:
    """The type of one tensor: the rule of Q4_K_M for a plain transformer of the Llama family.

    llama.cpp replaces types with blocks of 256 by larger ones where 256 does not divide the columns.
    """
    if wanted == "Q4_0":
        return "Q4_0"
    layer, eighth = int(re.search(r"\.(\d+)\.", name).group(1)), layers // 8
    generous = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    chosen = "Q6_K" if generous and name.endswith(("v_proj", "down_proj")) else "Q4_K"
    return FALLBACK[chosen] if columns % BLOCK[chosen] else chosen


def importance(model: Any, names: list[str], tokens: list[list[int]]) -> dict[str, Any]:
    """Name -> (K,) float32, the mean square of each input of each linear layer."""
    import torch

    sums = dict.fromkeys(names, 0.0)

    def record(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums[name] + inputs[0].flatten(0, -2).square().mean(0)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(record(name))
    with torch.no_grad():
        for window in tokens:
            model(torch.tensor([window]))
    return {name: (total / len(tokens)).contiguous() for name, total in sums.items()}


def quantize(options: argparse.Namespace, packed: Path) -> None:
    import numpy
    import torch
    from plain import linears, tensors
    from transformers import AutoModelForCausalLM

    ggml, names = library(), linears(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    weighed = importance(model, names, windows(options.tokens)) if options.imatrix else {}
    blocks = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach().contiguous()  # (N, K)
        rows, columns = weight.shape
        chosen = kind(name, options.type, model.config.num_hidden_layers, columns)
        if columns % BLOCK[chosen]:
            raise ValueError(f"{name} has {columns} columns, expected a multiple of {BLOCK[chosen]} for {chosen}")
        stored = numpy.empty(rows * ggml.ggml_row_size(TYPES[chosen], columns), dtype=numpy.uint8)
        matrix = ctypes.cast(weighed[name].data_ptr(), FLOATS) if weighed else None
        ggml.ggml_quantize_chunk(
            TYPES[chosen], ctypes.cast(weight.data_ptr(), FLOATS), stored.ctypes.data, 0, rows, columns, matrix
        )
        blocks[f"{chosen}:{rows}:{columns}:{name}"] = stored
    packed.mkdir()
    numpy.savez(packed / "blocks.npz", **blocks)
    rest = {name: tensor for name, tensor in tensors(options.model) if name.removesuffix(".weight") not in names}
    numpy.savez(packed / "rest.npz", **{name: tensor.half().numpy() for name, tensor in rest.items()})


def weights(options: argparse.Namespace, packed: Path) -> dict[str, Any]:
    import numpy
    import torch

    ggml, floats = library(), {}
    for label, stored in numpy.load(packed / "blocks.npz").items():
        chosen, rows, columns, name = label.split(":")
        weight = torch.empty(int(rows), int(columns))
        unpack = getattr(ggml, f"dequantize_row_{chosen.lower().replace('_k', '_K')}")
        unpack.argtypes, unpack.restype = [ctypes.c_void_p, FLOATS, ctypes.c_int64], None
        unpack(stored.ctypes.data, ctypes.cast(weight.data_ptr(), FLOATS), weight.numel())
        floats[f"{name}.weight"] = weight
    return floats


if __name__ == "__main__":
    main(NAME, REQUIREMENTS, __file__, quantize, weights, OPTIONS)
