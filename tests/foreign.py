"""Packed weights as other tools write them, in NumPy and Python integers, written from the format descriptions.

No code is shared with llmq: a stream of bits is one large integer, shifted.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Weight:
    """codes (N, K) and zeros (N, G) int, scales (N, G) in a torch dtype, groups (K,): the group of each column."""

    bits: int
    codes: Array
    zeros: Array
    scales: Tensor
    groups: Array

    @property
    def exact(self) -> Tensor:
        """(N, K) float32: (code - zero) * scale."""
        scales = self.scales.to(torch.float32).numpy()
        centred = (self.codes - self.zeros[:, self.groups]).astype(np.float32)
        return torch.from_numpy(centred * scales[:, self.groups])


def weight(
    bits: int,
    shape: tuple[int, int],
    group: int,
    *,
    dtype: torch.dtype = torch.float16,
    symmetric: bool = False,
    shuffled: bool = False,
    seed: int = 0,
) -> Weight:
    """Random codes, with every possible zero point, the lowest and the highest first; scales of both signs."""
    draw = np.random.default_rng(seed)
    (N, K), top = shape, (1 << bits) - 1
    G = -(-K // group)
    zeros = np.full((N, G), 1 << (bits - 1)) if symmetric else draw.integers(0, top + 1, (N, G))
    if not symmetric:
        zeros.flat[:4] = [0, 0, top, top - 1]
    groups = np.arange(K) // group
    if shuffled:
        groups = draw.permutation(groups)
    scales = torch.from_numpy(draw.normal(size=(N, G)) * 0.01 + 0.002).to(dtype)
    return Weight(bits, draw.integers(0, top + 1, (N, K)), zeros, scales, groups)


def words(codes: Sequence[int], bits: int, *, word: int = 32) -> list[int]:
    """The codes as one integer, the first code in the lowest bits, cut into words."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return [(number >> (word * i)) & ((1 << word) - 1) for i in range(-(-len(codes) * bits // word))]


def planes(codes: Sequence[int], bits: int) -> list[int]:
    """For every 32 codes, the words of their low bits, then the words of their next bits."""
    numbers: list[int] = []
    for start in range(0, len(codes), 32):
        low = 0
        for width in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(bits, (bits,)):
            numbers += words([(int(code) >> low) & ((1 << width) - 1) for code in codes[start : start + 32]], width)
            low += width
    return numbers


def signed(rows: Sequence[Sequence[int]], word: int = 32) -> Tensor:
    """(rows, words) of unsigned numbers as a torch tensor of signed ones."""
    dtype = {32: (np.uint32, np.int32), 16: (np.uint16, np.int16)}[word]
    return torch.from_numpy(np.array(rows, dtype=dtype[0]).view(dtype[1]).copy())


# ---- layouts: suffix -> tensor


def gptq(w: Weight, version: int, *, planar: bool = False, index: bool = True) -> dict[str, Tensor]:
    """Version 1 subtracts one from a whole word; where numbers straddle words, from each number separately."""
    pack = planes if planar else words
    straddling = w.bits in (3, 5, 6, 7)
    ones = sum(1 << (w.bits * i) for i in range(32 // w.bits))
    zeros = (w.zeros - 1) % (1 << w.bits) if version == 1 and straddling else w.zeros
    rows = [pack(column, w.bits) for column in zeros.T]
    if version == 1 and not straddling:
        rows = [[(word - ones) % (1 << 32) for word in row] for row in rows]
    tensors = {
        "qweight": signed([pack(row, w.bits) for row in w.codes]).T.contiguous(),
        "qzeros": signed(rows),
        "scales": w.scales.T.contiguous(),
    }
    return tensors | ({"g_idx": torch.from_numpy(w.groups.astype(np.int32))} if index else {})


def awq_gemm(w: Weight) -> dict[str, Tensor]:
    """Packed along N; the nibbles of a word hold the outputs 0 2 4 6 1 3 5 7."""
    order = [0, 2, 4, 6, 1, 3, 5, 7] if w.bits == 4 else range(8)

    def packed(rows: Array) -> Tensor:
        places = [8 * block + place for block in range(rows.shape[1] // 8) for place in order]
        return signed([words(row[places], w.bits) for row in rows])

    return {"qweight": packed(w.codes.T), "qzeros": packed(w.zeros.T), "scales": w.scales.T.contiguous()}


def awq_gemv(w: Weight, padded_groups: int) -> dict[str, Tensor]:
    """Packed along K; scales and zeros padded to `padded_groups`, a multiple of eight."""
    more = padded_groups - w.zeros.shape[1]
    return {
        "qweight": signed([words(row, 4) for row in w.codes]),
        "qzeros": signed([words(row, 4) for row in np.pad(w.zeros, ((0, 0), (0, more)))]),
        "scales": torch.nn.functional.pad(w.scales, (0, more)),
    }


def awq_gemv_fast(w: Weight, padded_groups: int, zeros_name: str = "qzeros") -> dict[str, Tensor]:
    """Words of 16 bits; word c of a row belongs to output c % 64 // 16 of four; zeros are multiplied by -scale."""
    N, K = w.codes.shape
    pairs = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27]
    pairs += [4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31]
    order = [pairs[8 * eight + place] for eight in range(4) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    rows = []
    for first in range(0, N, 4):
        row = []
        for c in range(K):
            output, start = first + c % 64 // 16, c // 64 * 64 + c % 16 * 4
            inputs = [place // 32 * 32 + order[place % 32] for place in range(start, start + 4)]
            row += words(w.codes[output][inputs], 4, word=16)
        rows.append(row)
    more = (0, padded_groups - w.zeros.shape[1])
    scaled = -(w.scales.to(torch.float32) * torch.from_numpy(w.zeros).to(torch.float32)).to(w.scales.dtype)
    return {
        "qweight": signed(rows, 16),
        "scales": torch.nn.functional.pad(w.scales, more).T.contiguous(),
        zeros_name: torch.nn.functional.pad(scaled, more).T.contiguous(),
    }


def compressed(w: Weight, *, zeros: bool = True, index: bool = False) -> dict[str, Tensor]:
    """pack-quantized: codes packed along K, zeros along N."""
    tensors = {
        "weight_packed": signed([words(row, w.bits) for row in w.codes]),
        "weight_scale": w.scales.contiguous(),
        "weight_shape": torch.tensor(w.codes.shape),
    }
    if zeros:
        tensors["weight_zero_point"] = signed([words(column, w.bits) for column in w.zeros.T]).T.contiguous()
    return tensors | ({"weight_g_idx": torch.from_numpy(w.groups.astype(np.int32))} if index else {})


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def fp4(kind: str, shape: tuple[int, int], seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """`nvfp4` or `mxfp4` as compressed-tensors stores it, and the weight (N, K) that it represents."""
    draw = np.random.default_rng(seed)
    (N, K), group = shape, 16 if kind == "nvfp4" else 32
    codes = draw.integers(0, 16, (N, K))
    tensors = {"weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))}
    if kind == "nvfp4":
        scale = torch.from_numpy(draw.uniform(0.1, 448, (N, K // group))).to(torch.float8_e4m3fn)
        tensors |= {"weight_scale": scale, "weight_global_scale": torch.tensor([4321.5])}
        scales = scale.to(torch.float32).numpy() / np.float32(4321.5)
    else:
        exponent = draw.integers(118, 126, (N, K // group))
        exponent[0, 0] = 0
        tensors["weight_scale"] = torch.from_numpy(exponent.astype(np.uint8))
        scales = np.exp2(exponent.astype(np.float64) - 127).astype(np.float32)
    return tensors, torch.from_numpy(E2M1[codes] * np.repeat(scales, group, axis=1))


# ---- checkpoints


def replaced(
    source: Path,
    where: Path,
    settings: Mapping[str, Any],
    pack: Callable[[str, tuple[int, ...]], tuple[Mapping[str, Tensor], Tensor] | None],
) -> tuple[Path, Path]:
    """Two copies of a float checkpoint: one with some weights packed, one with the same weights dequantized.

    `pack` returns the tensors, by their full names, and the floats for a weight's name and shape, or None to keep it.
    """
    packed, floats = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        replacement = pack(name, tuple(tensor.shape))
        packed |= {name: tensor} if replacement is None else dict(replacement[0])
        floats[name] = tensor if replacement is None else replacement[1].contiguous()
    for folder, tensors in ((where / "packed", packed), (where / "floats", floats)):
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = where / "packed" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": dict(settings)}))
    return where / "packed", where / "floats"


def folder(
    where: Path,
    settings: Mapping[str, Any] | None,
    modules: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """A checkpoint of nothing but packed weights; `settings` go into config.json, `documents` into other files."""
    where.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{suffix}": tensor for name, parts in modules.items() for suffix, tensor in parts.items()}
    save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama"} | ({} if settings is None else {"quantization_config": dict(settings)})
    for name, content in {"config.json": config, **(documents or {})}.items():
        (where / name).write_text(json.dumps(content))
    return where
