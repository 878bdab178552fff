"""Both kernels of GPTQ compile for every supported GPU: without spills, and with the tensor cores' instructions."""

import pytest

from tests.kernels.ahead_of_time import Compiled, Job, compile_all

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ARCHITECTURES = (80, 86, 89, 90, 100)
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that a program may have

POINTERS = {"columns": "*fp32", "codes": "*u8", "errors": "*fp32", "upper": "*fp32", "scales": "*fp32",
            "zeros": "*fp32", "group_of": "*i32"}  # fmt: skip
STRIDES = ("columns_expert", "columns_column", "codes_expert", "errors_expert", "upper_expert", "upper_row",
           "grid_expert", "group_of_expert")  # fmt: skip
BLOCK_SIGNATURE = {**POINTERS, "N": "i32", "levels": "fp32", "width": "i32", **dict.fromkeys(STRIDES, "i32")}


def block_job(arch: int, *, aligned: bool = True, columns: str = "rows side by side") -> Job:
    """`aligned`: N and the widths are divisible by 16; else only the alignment of torch's allocator and of `errors`."""
    from llmq_kernels.gptq_block import triton_kernel

    signature, constants = dict(BLOCK_SIGNATURE), {"columns_row": 1, "upper_column": 1}
    if columns != "rows side by side":  # the order of the paper does not change W
        signature["columns_row"] = "i32"
        constants = {"columns_column": 1, "upper_column": 1}
        del signature["columns_column"]
    everything = [name for name in signature if name != "levels"]
    return Job(
        "llmq_kernels.gptq_block.triton_kernel:quantize_block", signature,
        {**constants, "BLOCK": triton_kernel.BLOCK, "ROWS": triton_kernel.ROWS}, arch, triton_kernel.WARPS,
        aligned=everything if aligned else ["errors", "scales", "zeros"],
    )  # fmt: skip


def gram_job(arch: int, *, dtype: str = "bf16", upper_only: bool = True, aligned: bool = True) -> Job:
    """`aligned`: the number of tokens is divisible by 16, as the width and the distance of rows always are."""
    from llmq_kernels.gram import triton_kernel

    config = triton_kernel.config_for((arch // 10, arch % 10))
    return Job(
        "llmq_kernels.gram.triton_kernel:second_moment",
        {"x": f"*{dtype}", "gram": "*fp32", "T": "i32", "K": "i32", "x_row": "i32"},
        {"UPPER_ONLY": upper_only, "TILE": triton_kernel.TILE, "STEP": config.step, "STAGES": config.stages,
         "TILE_ROWS_TOGETHER": triton_kernel.TILE_ROWS_TOGETHER},
        arch, config.warps, config.stages, aligned=("x", "gram", "K", "x_row", *(("T",) if aligned else ())),
    )  # fmt: skip


JOBS = {
    **{f"block-{arch}": (block_job, {"arch": arch}) for arch in ARCHITECTURES},
    **{f"block-unaligned-{arch}": (block_job, {"arch": arch, "aligned": False}) for arch in ARCHITECTURES},
    "block-transposed-90": (block_job, {"arch": 90, "columns": "columns side by side"}),
    **{f"gram-{arch}": (gram_job, {"arch": arch}) for arch in ARCHITECTURES},
    **{f"gram-unaligned-{arch}": (gram_job, {"arch": arch, "aligned": False}) for arch in ARCHITECTURES},
    "gram-fp16-90": (gram_job, {"arch": 90, "dtype": "fp16"}),
    "gram-full-90": (gram_job, {"arch": 90, "upper_only": False}),
}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(JOBS, compile_all([make(**settings) for make, settings in JOBS.values()]), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_compiles_without_spills(name: str, compiled: dict[str, Compiled]) -> None:
    build = compiled[name]
    assert build.error is None
    assert build.stack == 0, f"{build.stack} bytes of registers are spilled"
    assert build.shared <= SHARED[JOBS[name][1]["arch"]]


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("gram")])
def test_second_moment_uses_tensor_cores(name: str, compiled: dict[str, Compiled]) -> None:
    instructions = compiled[name].instructions
    assert instructions.get(TENSOR_CORES[JOBS[name][1]["arch"]])
    assert instructions.get("LDGSTS"), "the steps in flight are not copied past the registers"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gptq_block_loads_16_bytes_and_stays_in_registers(arch: int, compiled: dict[str, Compiled]) -> None:
    build = compiled[f"block-{arch}"]
    assert build.shared <= 1024
    assert build.instructions["LDG"] <= 40  # 16 for the tile, 16 for U; 64 if loaded word by word
    assert not {"LDL", "STL"} & set(build.instructions)
