"""Files of llmq are read without torch: NumPy gives the same floats as llmq."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmq
from llmq import formats
from llmq.checkpoint.reader import Checkpoint
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq_kernels import files
from tests import foreign

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")

# runs where torch, transformers and llmq cannot be imported
WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "llmq"):
    sys.modules[name] = None
import numpy as np
from llmq_kernels import files
np.savez(sys.argv[2], **dict(files.dequantize(sys.argv[1])))
assert sys.modules["torch"] is None
"""


def example(scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> QuantizedTensor:
    draw = torch.Generator().manual_seed(seed)
    N, G = shape[0], shape[1] // scheme.columns_per_group(shape[1])
    codes = torch.randint(0, scheme.levels + 1, shape, dtype=torch.uint8, generator=draw)
    zeros = torch.randint(0, scheme.levels + 1, (N, G), dtype=torch.int16, generator=draw)
    scales = torch.randn(N, G, generator=draw).to(dtype)
    return QuantizedTensor(codes, scales, None if scheme.symmetric else zeros, scheme)


def written(folder: Path, name: str, *schemes: WeightScheme, dtype: torch.dtype = torch.float16) -> Path:
    layout = formats.load(name)
    weights = {m: example(s, (32, 160 * 8), dtype, i) for i, (m, s) in enumerate(zip(NAMES, schemes, strict=True))}
    settings = layout.quantization_config({m: q.scheme for m, q in weights.items()}, ["lm_head"])
    return foreign.folder(folder, settings, {m: layout.pack(q) for m, q in weights.items()})


CASES: dict[str, Callable[[Path], Path]] = {
    "compressed-tensors 4 bits, bf16": lambda path: written(
        path, "compressed-tensors", WeightScheme(4, 128), WeightScheme(4, 128), dtype=torch.bfloat16
    ),
    "compressed-tensors mixed": lambda path: written(
        path, "compressed-tensors", WeightScheme(3, 32, symmetric=False), WeightScheme(8, "channel")
    ),
    "compressed-tensors 2 bits": lambda path: written(
        path, "compressed-tensors", WeightScheme(2, 16, symmetric=False), WeightScheme(2, "channel", symmetric=False)
    ),
    "gptq": lambda path: written(path, "gptq", WeightScheme(4, 64), WeightScheme(8, 128)),
    "gptq asymmetric": lambda path: written(
        path, "gptq", WeightScheme(4, 64, symmetric=False), WeightScheme(8, 128, symmetric=False)
    ),
    "gptq_v2": lambda path: written(path, "gptq_v2", WeightScheme(4, 64), WeightScheme(4, 32, symmetric=False)),
    "awq": lambda path: written(
        path, "awq", WeightScheme(4, 128, symmetric=False), WeightScheme(4, 128, symmetric=False)
    ),
    "awq symmetric": lambda path: written(path, "awq", WeightScheme(4, 256), WeightScheme(4, 256)),
}


def packed_floats(folder: Path) -> dict[str, Any]:
    """Name -> (N, K) float32 of the packed weights, as llmq reads them; the folder has no others."""
    packed = PackedWeights(Checkpoint.open(folder))
    return {f"{module}.weight": packed.read(module).dequantize().numpy() for module in packed.modules}


@pytest.mark.parametrize("case", CASES)
def test_numpy_reads_the_same_floats_as_torch(tmp_path: Path, case: str) -> None:
    folder = CASES[case](tmp_path)
    expected = packed_floats(folder)
    read = dict(files.dequantize(folder))
    assert read.keys() == expected.keys()
    for name, weight in read.items():
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, expected[name])


def test_files_are_read_without_torch(tmp_path: Path) -> None:
    folder = CASES["compressed-tensors mixed"](tmp_path / "model")
    path = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": ""}
    out = tmp_path / "weights.npz"
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder), str(out)], check=True, env=path)
    read: Any = np.load(out)
    for name, weight in packed_floats(folder).items():
        np.testing.assert_array_equal(read[name], weight)


def test_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    folder = foreign.folder(tmp_path, {"quant_method": "fp8"}, {})
    with pytest.raises(ValueError, match="'fp8', expected compressed-tensors, gptq or awq"):
        list(files.dequantize(folder))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_ambiguous_shapes_use_the_declared_bits(bits: int, tmp_path: Path) -> None:
    quantized = example(WeightScheme(bits, "channel"), (4, 8), torch.float16, bits)
    layout = formats.load("compressed-tensors")
    settings = layout.quantization_config({NAMES[0]: quantized.scheme}, [])
    folder = foreign.folder(tmp_path, settings, {NAMES[0]: layout.pack(quantized)})
    ((_, weight),) = files.dequantize(folder)
    assert np.array_equal(weight, quantized.dequantize().numpy())


def test_shapes_that_fit_several_widths_are_refused() -> None:
    parts = formats.load("compressed-tensors").pack(example(WeightScheme(4, "channel"), (4, 8), torch.float16, 0))
    with pytest.raises(ValueError, match="fit the bit widths \\[2, 3, 4\\], expected one"):
        files.compressed_tensors({name: tensor.numpy() for name, tensor in parts.items()})


@pytest.mark.parametrize("whole_folder", [True, False])
def test_gguf_file_is_read_without_torch(checkpoint: Callable[..., Path], tmp_path: Path, whole_folder: bool) -> None:
    folder = tmp_path / "out"
    llmq.quantize(str(checkpoint("llama")), folder, method="rtn", group_size=32, scales="minmax", format="gguf")
    source = folder if whole_folder else folder / "out.gguf"
    path = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": ""}
    out = tmp_path / "weights.npz"
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(source), str(out)], check=True, env=path)
    read: Any = np.load(out)
    expected = dict(llmq.dequantize(folder / "out.gguf"))
    assert set(read) == expected.keys() and expected
    for name, weight in expected.items():
        np.testing.assert_array_equal(read[name], weight.numpy())
