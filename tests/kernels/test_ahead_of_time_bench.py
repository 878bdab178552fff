"""The naive kernels compile for GPUs, so that type errors show without one."""

import pytest

pytest.importorskip("triton")

from tests.kernels.ahead_of_time import Compiled, Job, compile_all

LINEAR = {
    "x": "*{}",
    "qweight": "*i32",
    "scales": "*{}",
    "zeros": "*i16",
    "out": "*{}",
    "M": "i32",
    "N": "i32",
    "K": "i32",
}
DEQUANTIZE = {name: kind for name, kind in LINEAR.items() if name not in ("x", "M")}


def job(name: str, signature: dict[str, str], dtype: str, arch: int, **constants: int) -> Job:
    kinds = {argument: kind.format(dtype) for argument, kind in signature.items()}
    aligned = [argument for argument in signature if argument != "M"]
    return Job(f"bench.triton_naive:{name}", kinds, {"GROUP": 128, **constants}, arch, aligned=aligned)


JOBS = {
    "linear, few rows, bf16, sm_90": job("_linear", LINEAR, "bf16", 90, BM=16, BN=64, BK=64),
    "linear, many rows, fp16, sm_80": job("_linear", LINEAR, "fp16", 80, BM=64, BN=64, BK=64),
    "dequantize, bf16, sm_90": job("_dequantize", DEQUANTIZE, "bf16", 90, BN=128, BK=32),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(JOBS, compile_all(list(JOBS.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_naive_kernels_compile(compiled: dict[str, Compiled], name: str) -> None:
    assert compiled[name].error is None
    assert compiled[name].instructions
