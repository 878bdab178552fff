"""The kernel of a tuning step compiles for every supported GPU: without spills, in loads and stores of 16 bytes."""

import pytest

from tests.kernels.ahead_of_time import Compiled, Job, compile_all

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

FLOATS = ("gradient", "value", "mean", "square", "scales", "weight", "sums")
POINTERS = (*FLOATS, "origin", "zeros", "codes")
NUMBERS = ("levels", "middle", "divisor", "rate", "root", "keep_mean", "keep_square", "epsilon")


def job(arch: int, *, short: bool = False, aligned: bool = True, group: int = 128) -> Job:
    """Block tuning of symmetric weights, or with `short` the end-to-end tuning of codes and scales of asymmetric ones.

    `aligned`: the width of a group is divisible by 16.
    """
    from llmq_kernels.tuning_step import triton_kernel

    types = dict.fromkeys(FLOATS, "*bf16") | {"sums": "*fp32", "origin": "*u8", "zeros": "*i16", "codes": "*u8"}
    types |= {name: "*bf16" if short else "*fp32" for name in ("mean", "square")}
    types |= {"value": "*fp16" if short else "*fp32"}
    width = min(group, triton_kernel.TILE)
    constants = {"ZEROS": short, "RESULT": not short, "SUMS": short, "GROUPS": triton_kernel.TILE // width}
    order = ("gradient", "value", "mean", "square", "origin", "scales", "zeros", "codes", "weight", "sums")
    signature = {name: types[name] for name in order} | {"count": "i32", "width": "i32"}
    return Job(
        "llmq_kernels.tuning_step.triton_kernel:step_groups", {**signature, **dict.fromkeys(NUMBERS, "fp32")},
        {**constants, "WIDTH": width}, arch, triton_kernel.WARPS,
        aligned=[*POINTERS, *(["width"] if aligned else [])], options={"enable_fp_fusion": False},
    )  # fmt: skip


JOBS = {
    **{str(arch): job(arch) for arch in (80, 90, 100)},
    "channel-90": job(90, group=4096),
    "short-90": job(90, short=True, group=32),
    "unaligned-90": job(90, aligned=False),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(JOBS, compile_all(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_compiles_without_spills(name: str, compiled: dict[str, Compiled]) -> None:
    build = compiled[name]
    assert build.error is None
    assert build.stack == 0, f"{build.stack} bytes of registers are spilled"
    assert build.registers <= (168 if "unaligned" in name else 128), "few programs fit into a multiprocessor"


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_loads_and_stores_whole_vectors(arch: str, compiled: dict[str, Compiled]) -> None:
    """8 weights per thread: 2 loads of 16 bytes each for v, mean and square, 1 for gradient and codes, and scales."""
    instructions = compiled[arch].instructions
    assert instructions["LDG"] <= 16 and instructions["STG"] <= 8, instructions
    assert not {"LDL", "STL"} & set(instructions)
