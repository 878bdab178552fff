"""The search for scales: torch against the definition, the kernel (in Triton's interpreter) against torch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.grid_search import op, reference, torch_path
from llmq_kernels.grid_search.candidates import Candidates

SHAPES = [(5, 2, 32), (3, 3, 16), (2, 1, 40), (17, 1, 128)]  # rows, groups, columns: powers of two and other sizes


def candidates(bits: int, symmetric: bool, dtype: torch.dtype = torch.float32) -> Candidates:
    factors = tuple(torch.linspace(0.5, 1.08, 9).tolist())
    offsets = tuple(torch.linspace(-0.07, 0.07, 5).tolist())
    shifts = (0,) if symmetric else (-2, -1, 0, 1, 2)
    return Candidates(2**bits - 1, symmetric, factors, offsets, shifts, 1e-9, dtype)


def arguments(
    shape: tuple[int, int, int], tried: Candidates, seed: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(shape, generator=generator)
    costs = torch.rand(shape[1:], generator=generator)
    if tried.symmetric:
        widest = groups.abs().amax(-1) * (2 / tried.levels)
        zeros = torch.full_like(widest, (tried.levels + 1) // 2)
    else:
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        widest = (high - low) / tried.levels
        zeros = (-low / widest).round_()
    first = torch_path.stored(widest, tried.dtype, tried.smallest)
    return groups, costs, (first, zeros), widest, zeros


def errors(groups: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> np.ndarray:
    """(R, G) float64, by the definition."""
    return np.array(
        [
            [
                reference.error(groups[r, g].numpy(), costs[g].numpy(), float(scales[r, g]), float(zeros[r, g]), levels)
                for g in range(groups.shape[1])
            ]
            for r in range(groups.shape[0])
        ]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torch_search_is_as_good_as_the_reference(shape: tuple[int, int, int], symmetric: bool, bits: int) -> None:
    """An error in float32 has a relative error of about 2**-22, which can only change a close decision."""
    tried = candidates(bits, symmetric)
    groups, costs, first, widest, zeros = arguments(shape, tried, bits)
    scales, chosen = torch_path.search(groups, costs, first, widest, zeros, tried)
    chosen_errors = errors(groups, costs, scales, chosen, tried.levels)
    for r in range(shape[0]):
        for g in range(shape[1]):
            start = (float(first[0][r, g]), float(first[1][r, g]))
            parts = (float(widest[r, g]), float(zeros[r, g]), tried.levels, tried.factors, tried.offsets, tried.shifts)
            best = reference.search(groups[r, g].numpy(), costs[g].numpy(), start, *parts)
            least = reference.error(groups[r, g].numpy(), costs[g].numpy(), *best, tried.levels)
            assert chosen_errors[r, g] <= least * (1 + 2**-18)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_chooses_as_torch(shape: tuple[int, int, int], symmetric: bool, bits: int, dtype: torch.dtype) -> None:
    """If it does not, the two candidates are equal except for the last bits of a float32."""
    from llmq_kernels.grid_search import triton_kernel

    tried = candidates(bits, symmetric, dtype)
    groups, costs, first, widest, zeros = arguments(shape, tried, 7 * bits)
    kernel = triton_kernel.search(groups, costs, first, widest, zeros, tried)
    torch_ = torch_path.search(groups, costs, first, widest, zeros, tried)
    same = (kernel[0] == torch_[0]) & (kernel[1] == torch_[1])
    assert same.float().mean() > 0.9
    ours, theirs = (errors(groups, costs, *choice, tried.levels) for choice in (kernel, torch_))
    np.testing.assert_allclose(ours, theirs, rtol=2**-18)


def test_groups_may_be_a_view_of_a_larger_tensor() -> None:
    from llmq_kernels.grid_search import triton_kernel

    tried = candidates(4, True)
    groups, costs, first, widest, zeros = arguments((4, 2, 32), tried, 1)
    wide = torch.full((4, 2, 64), 1e9)
    wide[..., :32] = groups
    expected = triton_kernel.search(groups, costs, first, widest, zeros, tried)
    assert all(map(torch.equal, triton_kernel.search(wide[..., :32], costs, first, widest, zeros, tried), expected))


def test_bad_arguments_are_refused() -> None:
    tried = candidates(4, True)
    groups, costs, first, widest, zeros = arguments((4, 2, 32), tried, 1)
    with pytest.raises(KernelInputError, match=r"costs \(3, 32\), expected \(R, G, g\) and \(G, g\)"):
        op.search(groups, torch.ones(3, 32), first, widest, zeros, tried)
    with pytest.raises(KernelInputError, match=r"widest: found \(4, 1\)"):
        op.search(groups, costs, first, widest[:, :1], zeros, tried)
    with pytest.raises(KernelInputError, match=r"groups: found torch.float64"):
        op.search(groups.double(), costs, first, widest, zeros, tried)
    with pytest.raises(KernelInputError, match="cannot be stored in torch.int8"):
        op.search(groups, costs, first, widest, zeros, candidates(4, True, torch.int8))
