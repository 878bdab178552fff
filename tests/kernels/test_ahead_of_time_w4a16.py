"""The W4A16 kernels, compiled for every supported GPU.

Covered: every shipped configuration in float16 and bfloat16 for its architecture, with zeros, bias, groups of 128 and
four splits; on one architecture also groups of 32, one group per row, symmetric, one split and the most splits, a
partial last tile, scales of another dtype; the kernels of other widths and the dequantizing one.
"""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from llmq_kernels.w4a16 import configs
from tests.kernels.ahead_of_time import Compiled, Job, compile_all

pytestmark = pytest.mark.slow

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # maximum bytes per block
CONVERSIONS = ("I2F", "I2FP", "I2I", "I2IP")
POINTERS = {"words": "*i16", "zeros": "*i16", "workspace": "*fp32", "counters": "*i32"}
ALIGNED = ("x", "words", "scales", "zeros", "bias", "out", "workspace", "counters", "N", "K", "x_stride")


def fused(arch: int, dtype: str, config: configs.Config, scales: str | None = None, **constants: Any) -> Job:
    """One launch of the fused kernel; `constants` with BITS is of another width than four."""
    signature = POINTERS | {"x": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}", "scales": f"*{scales or dtype}"}
    signature |= {"M": "i32", "N": "i32", "K": "i32", "x_stride": "i32"}
    fixed = {"PLANES": 4, "HAS_ZEROS": True, "HAS_BIAS": True, "EVEN_K": True, "STAGES": config.stages}
    fixed |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "SPLITS": 4 if config.ctas_per_sm else 1}
    if "BITS" not in constants:
        fixed |= {"SCALE_AFTER": config.scale == "after", "ASSEMBLY": True, "PREFETCH": config.prefetch}
    name = "fused_planes" if "BITS" in constants else "fused4"
    kernel = f"llmq_kernels.w4a16.triton_kernel:{name}"
    return Job(kernel, signature, fixed | constants, arch, config.warps, config.stages, ALIGNED)


def dequantizing(arch: int, dtype: str, bits: int) -> Job:
    signature = {"words": "*i16", "scales": f"*{dtype}", "zeros": "*i16", "out": f"*{dtype}"}
    signature |= {"first_row": "i32", "R": "i32", "N": "i32", "K": "i32"}
    constants = {"PLANES": 4, "HAS_ZEROS": True, "BITS": bits, "BLOCK_N": 32}
    aligned = ("words", "scales", "zeros", "out", "N", "K")
    return Job("llmq_kernels.w4a16.triton_kernel:dequantize", signature, constants, arch, 4, 3, aligned)


def shipped() -> dict[str, tuple[Job, configs.Config]]:
    jobs = {}
    for arch in SHARED_LIMIT:
        for choice in configs.shipped()[arch].default:
            for dtype in ("fp16", "bf16"):
                config = choice.config
                name = f"sm_{arch} {dtype} up to {choice.max_rows}"
                name += f", from {choice.min_features} features" if choice.min_features else ""
                jobs[name] = fused(arch, dtype, config), config
    return jobs


def variations() -> dict[str, Job]:
    table = configs.shipped()[90]
    small, wide, large = table.config(1, 4096, 4096), table.config(1, 8192, 4096), table.default[-1].config
    medium = configs.shipped()[80].default[1].config
    return {
        "groups of 32": fused(90, "bf16", small, PLANES=1),
        "groups of 32 before": fused(90, "bf16", large, PLANES=1),
        "one group per row": fused(80, "fp16", medium, PLANES=0),
        "symmetric, one split": fused(90, "fp16", small, HAS_ZEROS=False, HAS_BIAS=False, SPLITS=1),
        "cut tile": fused(90, "bf16", small, PLANES=2, EVEN_K=False),
        "scales of another dtype, most splits": fused(90, "fp16", large, scales="fp32", SPLITS=configs.MOST_SPLITS),
        "2 bits": fused(90, "bf16", small, BITS=2),
        "3 bits": fused(80, "fp16", replace(medium, stages=3), BITS=3),
        "8 bits": fused(90, "bf16", table.config(64, 4096, 4096), BITS=8),
        "wide, symmetric": fused(90, "bf16", wide, HAS_ZEROS=False),
        "wide, groups of 32": fused(90, "bf16", wide, PLANES=1),
        "64 rows, symmetric": fused(90, "bf16", table.config(64, 4096, 4096), HAS_ZEROS=False),
        "128 x 64": fused(90, "bf16", configs.Config(128, 64, 4, 3, 1, "before", False), HAS_ZEROS=False),
        "dequantize": dequantizing(90, "bf16", 4),
    }


@pytest.fixture(scope="session")
def compiled() -> dict[str, Compiled]:
    jobs = {name: job for name, (job, _) in shipped().items()} | variations()
    return dict(zip(jobs, compile_all(list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", [*shipped(), *variations()])
def test_compiles_without_spills_and_conversions(name: str, compiled: dict[str, Compiled]) -> None:
    code = compiled[name]
    assert code.error is None
    assert code.stack == 0
    assert {mnemonic for mnemonic in code.instructions if mnemonic in CONVERSIONS} == set()


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_feed_tensor_cores_from_registers(name: str, compiled: dict[str, Compiled]) -> None:
    job, config = shipped()[name]
    code = compiled[name]
    assert code.shared <= SHARED_LIMIT[job.arch]
    instructions = code.instructions
    assert instructions["LOP3"] >= 16 and instructions["LDGSTS"] >= 5  # unpacking; asynchronous copies
    if job.arch == 90:
        tiles = config.block_n // (16 * config.warps)  # of 64 rows of W per group of four warps
        assert instructions["HGMMA"] == 8 * tiles
        assert instructions["LDSM"] == 2 * tiles  # words only; unpacked weights in shared memory would add to it
    else:
        assert instructions.get("HMMA", 0) + instructions.get("UTCHMMA", 0) >= 8
    if job.arch <= 90 and config.scale == "after":
        # About 7 and 11 with two tiles; each pass of weights or scales through shared memory costs two per tile.
        assert instructions["BAR"] <= (10 if config.block_n == 64 else 12)


# Programs per multiprocessor of an H100 or H200, with 65,536 registers and 228 KB; every program takes 1 KB more.
FITTING = {"wide, symmetric": 4, "64 rows, symmetric": 4, "128 x 64": 2}


@pytest.mark.parametrize("name", FITTING)
def test_programs_that_share_a_multiprocessor(name: str, compiled: dict[str, Compiled]) -> None:
    code = compiled[name]
    assert 65536 // (-(-code.registers // 8) * 8 * 128) >= FITTING[name]
    assert (228 << 10) // (code.shared + 1024) >= FITTING[name]


def test_other_widths_use_tensor_cores(compiled: dict[str, Compiled]) -> None:
    for name in ("2 bits", "8 bits"):
        assert compiled[name].instructions["HGMMA"] == 8
    assert compiled["3 bits"].instructions["HMMA"] >= 8
