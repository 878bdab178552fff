"""The search compiled for every supported GPU: no spills, no fused arithmetic."""

from itertools import product

import pytest

from tests.kernels.ahead_of_time import Compiled, Job, compile_all

pytestmark = pytest.mark.slow

ARCHITECTURES = (80, 86, 89, 90, 100)
FLOATS = ("groups", "costs", "first_scales", "first_zeros", "widest", "zeros", "factors", "offsets")
POINTERS = (*FLOATS, "scales_out", "zeros_out")
SIGNATURE = {
    **dict.fromkeys(POINTERS, "*fp32"),
    "scales_out": "*bf16",
    **dict.fromkeys(("R", "G", "width", "row_stride", "group_stride"), "i32"),
    **dict.fromkeys(("levels", "smallest", "largest"), "fp32"),
}
WIDTHS = (32, 128, 1024)  # columns of a group

Builds = dict[tuple[int, int], Compiled]


@pytest.fixture(scope="module")
def compiled() -> Builds:
    from llmq_kernels.grid_search.triton_kernel import TILE

    shape = {width: {"ROWS": TILE // width, "WIDTH": width} for width in WIDTHS}
    cases = list(product(ARCHITECTURES, WIDTHS))
    jobs = [
        Job(
            "llmq_kernels.grid_search.triton_kernel:search_groups",
            SIGNATURE,
            {"FACTORS": 60, "OFFSETS": 16, "LEAST_SHIFT": -2, "SHIFTS": 5} | shape[width],
            architecture,
            num_warps=4,
            aligned=(*POINTERS, "width", "row_stride", "group_stride"),
            options={"enable_fp_fusion": False},
        )
        for architecture, width in cases
    ]
    return dict(zip(cases, compile_all(jobs), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_weights_stay_in_registers(compiled: Builds, architecture: int, width: int) -> None:
    built = compiled[architecture, width]
    assert built.error is None
    assert built.stack == 0
