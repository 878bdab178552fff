"""The experts' kernels, compiled for every supported GPU: every tile size that `gpu.py` launches."""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import pytest

from llmq_kernels.w4a16_experts import gpu
from tests.kernels.ahead_of_time import Compiled, Job, compile_all

pytestmark = pytest.mark.slow

ARCHITECTURES = (80, 86, 89, 90, 100)
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
INTEGER_TO_FLOAT = ("I2F", "I2FP")
POINTERS = {"words": "*i16", "zeros": "*i16", "token": "*i64", "expert": "*i64", "pairs": "*i64", "first_pair": "*i64"}


class Case(NamedTuple):
    tiles: gpu.Tiles
    arch: int
    dtype: str
    planes: int  # columns of a group / 32; 0: channel

    @property
    def job(self) -> Job:
        alone = self.tiles is gpu.ALONE
        routing = ["token", "expert"] if alone else ["token", "pairs", "first_pair"]
        pointers = ["x", *routing, "words", "scales", "zeros", "bias", "out"]
        sizes = ["N", "K", "G", *([] if alone else ["E"]), "x_stride"]
        constants = {
            "PLANES": self.planes, "HAS_ZEROS": self.planes != 0, "HAS_BIAS": True, "ASSEMBLY": True,
            "BLOCK_N": self.tiles.block_n, "STAGES": self.tiles.stages,
        }  # fmt: skip
        return Job(
            kernel=f"llmq_kernels.w4a16_experts.triton_kernel:{'alone' if alone else 'grouped'}",
            signature={name: POINTERS.get(name, f"*{self.dtype}") for name in pointers} | dict.fromkeys(sizes, "i32"),
            constants=constants | ({} if alone else {"EXPERTS": 128, "BLOCK_M": self.tiles.block_m}),
            arch=self.arch,
            num_warps=self.tiles.warps,
            num_stages=self.tiles.stages,
            aligned=[*pointers, "N", "K", "x_stride"],
        )


TILES = (gpu.ALONE, *gpu.GROUPED)
CASES = [
    *(Case(tiles, arch, "bf16", 4) for arch in ARCHITECTURES for tiles in TILES),
    Case(gpu.ALONE, 90, "fp16", 1),
    Case(gpu.GROUPED[-1], 90, "fp16", 1),
    Case(gpu.GROUPED[-1], 80, "fp16", 0),
]


@cache
def compiled() -> Mapping[Case, Compiled]:
    return dict(zip(CASES, compile_all([case.job for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"sm_{c.arch} {c.dtype} {c.planes} {c.tiles.block_m}")
def test_compiles_without_spills_or_conversions(case: Case) -> None:
    result = compiled()[case]
    assert result.error is None
    assert result.stack == 0
    assert not set(INTEGER_TO_FLOAT) & set(result.instructions)
    assert result.instructions["LDGSTS"] > 0  # weights arrive by asynchronous copies


@pytest.mark.parametrize("case", [case for case in CASES if case.tiles is not gpu.ALONE], ids=str)
def test_many_pairs_use_tensor_cores(case: Case) -> None:
    assert compiled()[case].instructions[TENSOR_CORES[case.arch]] > 0


def test_one_pair_uses_no_tensor_cores() -> None:
    """Seven of eight rows of x would be padding."""
    for case in CASES:
        if case.tiles is gpu.ALONE:
            assert not set(TENSOR_CORES.values()) & set(compiled()[case].instructions)
