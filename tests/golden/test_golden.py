"""Exact bytes: words computed by hand, and checkpoints written by other tools."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmq import formats
from llmq.formats import awq, compressed_tensors, gptq, mlx
from llmq.formats.base import Layout, Reader, Reading
from llmq.formats.codecs import bit_packing
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

FOLDERS = ("gptqmodel-gptq-sym-g128", "gptqmodel-awq-gemm-asym-g32", "llmcompressor-ct-w4a16-sym-g128")


def unsigned(words: Tensor) -> list[str]:
    """int32 words as eight hexadecimal digits, the highest nibble first."""
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()]


def stairs(scheme: WeightScheme, zeros: list[int] | None = None) -> QuantizedTensor:
    """(8, 8), one group per row: code [n, k] = n + k, the zero point of row n is zeros[n]."""
    codes = (torch.arange(8)[:, None] + torch.arange(8)).to(torch.uint8)
    column = None if zeros is None else torch.tensor([zeros], dtype=torch.int16).T
    return QuantizedTensor(codes, torch.ones(8, 1), column, scheme)


# ---- by hand

SYMMETRIC, ASYMMETRIC = WeightScheme(4, "channel"), WeightScheme(4, "channel", symmetric=False)


@pytest.mark.parametrize(
    ("bits_per_code", "codes", "words"),
    [
        # Four bits are a hexadecimal digit, the first code the lowest: 0 1 2 … 15 read backwards.
        (4, list(range(16)), ["76543210", "fedcba98"]),
        # Eight bits are two digits.
        (8, [1, 2, 3, 0xFF], ["ff030201"]),
        # Two bits: 0 1 2 3 backwards is 11 10 01 00 in binary, 0xe4, four times.
        (2, [0, 1, 2, 3] * 4, ["e4e4e4e4"]),
        # Three bits are an octal digit.  0o76543210 is the 24 bits 111 110 101 100 011 010 001 000
        #   = 1111 1010 1100 0110 1000 1000 = 0xfac688; twice 24 bits = 0xfac688fac688, cut after 32 bits.
        (3, [0, 1, 2, 3, 4, 5, 6, 7] * 2, ["88fac688", "0000fac6"]),
        # Thirty-two times 7 = 96 bits set, in exactly three words.
        (3, [7] * 32, ["ffffffff"] * 3),
    ],
)
def test_streams_of_bits_match_words_by_hand(bits_per_code: int, codes: list[int], words: list[str]) -> None:
    assert unsigned(bit_packing.pack(torch.tensor(codes, dtype=torch.uint8), bits_per_code)) == words


def test_compressed_tensors_words_match_words_by_hand() -> None:
    # Row n holds n, n + 1, … n + 7, the lowest nibble first.  Zero points run along N: nibble n is that of row n.
    tensors = compressed_tensors.pack(stairs(ASYMMETRIC, zeros=[0, 1, 2, 3, 4, 5, 6, 15]))
    assert unsigned(tensors["weight_packed"]) == [
        "76543210", "87654321", "98765432", "a9876543", "ba987654", "cba98765", "dcba9876", "edcba987",
    ]  # fmt: skip
    assert unsigned(tensors["weight_zero_point"]) == ["f6543210"]
    assert tensors["weight_shape"].tolist() == [8, 8]
    assert tensors["weight_scale"].shape == (8, 1)


def test_mlx_words_match_words_by_hand() -> None:
    # The words of compressed-tensors, read as unsigned.  The offset of a group is minus its zero point times its scale.
    codes = (torch.arange(32) % 8).to(torch.uint8)[None]
    symmetric = QuantizedTensor(codes, torch.full((1, 1), 0.5, dtype=torch.bfloat16), None, WeightScheme(4, 32))
    tensors = mlx.pack(symmetric)
    assert unsigned(tensors["weight"].view(torch.int32)) == ["76543210"] * 4 and tensors["weight"].dtype == torch.uint32
    assert tensors["biases"].tolist() == [[-4.0]] and tensors["biases"].dtype == torch.bfloat16
    zeros, scheme = torch.full((1, 1), 3, dtype=torch.int16), WeightScheme(4, 32, symmetric=False)
    tensors = mlx.pack(QuantizedTensor(codes, torch.full((1, 1), 0.1, dtype=torch.bfloat16), zeros, scheme))
    scale = torch.tensor(0.1, dtype=torch.bfloat16).item()  # 0.10009765625, times 3 has more digits than a bfloat16
    assert tensors["scales"].item() == scale and tensors["biases"].item() == -3 * scale
    assert tensors["scales"].dtype == tensors["biases"].dtype == torch.float32


def test_gptq_words_match_words_by_hand() -> None:
    # Column n of the only row of words holds inputs 0 … 7 of output n: the same numbers next to each other.
    # Symmetric is v1: 8 is stored as 7, in every nibble.
    tensors = gptq.pack(stairs(SYMMETRIC))
    assert tensors["qweight"].shape == tensors["scales"].shape == (1, 8)
    assert unsigned(tensors["qweight"])[:2] == ["76543210", "87654321"]
    assert unsigned(tensors["qzeros"]) == ["77777777"]
    assert tensors["g_idx"].tolist() == [0] * 8


def test_gptq_asymmetric_zeros_are_stored_unchanged() -> None:
    # v2: nibble n is the zero point of output n.
    assert unsigned(gptq.pack(stairs(ASYMMETRIC, zeros=[0, 1, 2, 3, 4, 5, 6, 15]))["qzeros"]) == ["f6543210"]


def test_gptq_words_of_eight_bits() -> None:
    # Four codes per word, two digits each; inputs 0 … 3 in the first row of words, 4 … 7 in the second.
    # Symmetric: 128 is stored as 127 = 0x7f.
    tensors = gptq.pack(stairs(WeightScheme(8, "channel")))
    assert unsigned(tensors["qweight"][:, 0]) == ["03020100", "07060504"]
    assert unsigned(tensors["qzeros"]) == ["7f7f7f7f"] * 2


def test_gptq_version_one_borrows_inside_the_word() -> None:
    # Zero points 0 1 2 3 4 5 6 7 are the word 0x76543210.  A writer of v1 subtracts one from each nibble:
    #   0x76543210 - 0x11111111 = 0x654320ff
    # 0 - 1 borrows, so nibble 0 is f; nibble 1 is 1 - 1 - 1 = -1 = f, which borrows again; nibble 2 is 2 - 1 - 1 = 0.
    # Adding one to each nibble separately would read 16 16 1 3 4 5 6 7.
    zeros = list(range(8))
    tensors = gptq.pack(stairs(ASYMMETRIC, zeros)) | {"qzeros": torch.tensor([[0x654320FF]], dtype=torch.int32)}
    reading = gptq.read_config({"bits": 4, "group_size": -1, "sym": False})("a")
    assert reading == Reading(ASYMMETRIC, zeros_offset=1)
    assert gptq.unpack(tensors, reading).zeros.flatten().tolist() == zeros  # type: ignore[union-attr]


def test_gptq_version_one_borrows_out_of_the_word() -> None:
    # All zero points are 0: 0 - 0x11111111 = 0xeeeeeeef modulo 2**32.
    word = torch.tensor([[0xEEEEEEEF - (1 << 32)]], dtype=torch.int32)
    tensors = gptq.pack(stairs(ASYMMETRIC, [0] * 8)) | {"qzeros": word}
    q = gptq.unpack(tensors, Reading(ASYMMETRIC, zeros_offset=1))
    assert q.zeros.flatten().tolist() == [0] * 8  # type: ignore[union-attr]


def test_gptq_two_bits_are_read() -> None:
    # Sixteen codes per word: 0 1 2 3 repeated is 0xe4e4e4e4.  A word holds the zero points 0 … 3 of sixteen outputs,
    # repeated too; v1: 0xe4e4e4e4 - 0x55555555 = 0x8f8f8f8f.
    tensors = {
        "qweight": torch.full((1, 16), 0xE4E4E4E4 - (1 << 32), dtype=torch.int32),
        "qzeros": torch.tensor([[0x8F8F8F8F - (1 << 32)]], dtype=torch.int32),
        "scales": torch.ones(1, 16),
    }
    q = gptq.unpack(tensors, Reading(WeightScheme(2, 16, symmetric=False), zeros_offset=1))
    assert q.codes.tolist() == [[0, 1, 2, 3] * 4] * 16
    assert q.zeros.flatten().tolist() == [0, 1, 2, 3] * 4  # type: ignore[union-attr]


def test_awq_words_match_words_by_hand() -> None:
    # Input 0 of the eight outputs is 0 … 7.  Nibbles, lowest first, are outputs 0 2 4 6 1 3 5 7, so highest first they
    # are 7 5 3 1 6 4 2 0.  Input 1 is one more in each nibble; the zero points 0 … 7 have the order of input 0.
    tensors = awq.pack(stairs(ASYMMETRIC, zeros=list(range(8))))
    assert tensors["qweight"].shape == (8, 1)
    assert unsigned(tensors["qweight"])[:2] == ["75316420", "86427531"]
    assert unsigned(tensors["qzeros"]) == ["75316420"]
    assert unsigned(awq.pack(stairs(SYMMETRIC))["qzeros"]) == ["88888888"]


# ---- by other tools


def checkpoint(folder: Path) -> tuple[Layout, Reader, dict[str, dict[str, Tensor]]]:
    """The layout, how to read modules, and module name -> suffix -> tensor of the quantized modules of layer 0."""
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    layout = formats.detect(block)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        if module.startswith("model.layers.0.") and suffix in layout.suffixes:
            modules.setdefault(module, {})[suffix] = tensor
    return layout, layout.read_config(block), modules


@pytest.mark.parametrize("folder", FOLDERS)
def test_foreign_weights_are_read_bit_for_bit(shared: Path, folder: str) -> None:
    layout, read, modules = checkpoint(shared / "golden" / folder)
    expected = load_file(shared / "golden" / folder / "expected.safetensors")
    assert {f"{module}.weight" for module in modules} == {name for name in expected if name.endswith(".weight")}
    for module, tensors in modules.items():
        reading = read(module)
        assert reading is not None
        weight = expected[f"{module}.weight"]
        assert torch.equal(layout.unpack(tensors, reading).dequantize().to(weight.dtype), weight), module


@pytest.mark.parametrize("folder", FOLDERS)
def test_foreign_weights_are_written_to_the_same_bytes(shared: Path, folder: str) -> None:
    layout, read, modules = checkpoint(shared / "golden" / folder)
    assert modules
    for module, tensors in modules.items():
        reading = read(module)
        assert reading is not None
        written = layout.pack(layout.unpack(tensors, reading))
        assert written.keys() == tensors.keys()
        for suffix, tensor in tensors.items():
            assert written[suffix].dtype == tensor.dtype
            assert torch.equal(written[suffix].view(torch.uint8), tensor.view(torch.uint8)), f"{module}.{suffix}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_foreign_configurations_keep_the_head_in_float(shared: Path, folder: str) -> None:
    _, read, _ = checkpoint(shared / "golden" / folder)
    assert read("lm_head") is None
