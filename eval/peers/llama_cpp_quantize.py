"""llama.cpp's own quantizer, `llama_model_quantize` of its library, with and without an importance matrix.

    python eval/peers/llama_cpp_quantize.py LIBRARY SOURCE.gguf OUT.gguf Q4_K_M [IMATRIX.npz]

LIBRARY is a folder with libllama*.so, such as `bins/linux-x64` of the npm package @node-llama-cpp/linux-x64, which is
made of llama.cpp's releases (the library in xllamacpp lacks this function). IMATRIX.npz holds, for each tensor of the
file by name, the mean square of each input. The fields of the parameters are those of include/llama.h in v0.5.0; their
size is checked against the defaults, so that another version ends with an error.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

FLOATS = ctypes.POINTER(ctypes.c_float)


class Matrix(ctypes.Structure):
    """`llama_model_imatrix_data`"""

    _fields_ = [("name", ctypes.c_char_p), ("data", FLOATS), ("size", ctypes.c_size_t)]


class Parameters(ctypes.Structure):
    """`llama_model_quantize_params`"""

    _fields_ = [
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int),
        ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("requantize", "quantize_output", "copy", "pure", "split", "dry_run")),
        ("matrix", ctypes.POINTER(Matrix)),
        *((name, ctypes.c_void_p) for name in ("keys", "types", "layers")),
    ]


def library(folder: Path) -> ctypes.CDLL:
    """The library, with the parts that it needs loaded first."""
    for pattern in ("libggml-base*.so*", "libggml.*so*"):
        for file in sorted(folder.glob(pattern)):
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    libraries = [file for file in sorted(folder.glob("libllama*.so*")) if "common" not in file.name]
    if not libraries:
        raise SystemExit(f"error: {folder} has no libllama*.so\ntry:   npm pack @node-llama-cpp/linux-x64")
    return ctypes.CDLL(str(libraries[0]))


def quantize(folder: Path, source: Path, out: Path, file_type: int, matrix: dict[str, Any]) -> None:
    """Write `out`; `matrix` has float32 arrays (K,) by the names of tensors."""
    llama = library(folder)
    llama.llama_model_quantize_default_params.restype = Parameters
    parameters = llama.llama_model_quantize_default_params()
    pointers = (parameters.matrix, parameters.keys, parameters.types, parameters.layers)
    if any(pointers) or not parameters.quantize_output or parameters.output_type != parameters.embedding_type:
        raise SystemExit("error: the defaults of this version of llama.cpp are laid out in another way")
    entries = (Matrix * (len(matrix) + 1))()
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(FLOATS)
    parameters.threads, parameters.file_type = 1, file_type
    if matrix:
        parameters.matrix = entries
    llama.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"error: llama.cpp did not write {out}")


def main() -> None:
    import gguf
    import numpy

    folder, source, out, name, *matrix = sys.argv[1:]
    loaded = dict(numpy.load(matrix[0])) if matrix else {}
    values = {key: numpy.ascontiguousarray(array, dtype=numpy.float32) for key, array in loaded.items()}
    quantize(Path(folder), Path(source), Path(out), int(gguf.LlamaFileType[f"MOSTLY_{name}"]), values)


if __name__ == "__main__":
    main()
