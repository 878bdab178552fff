"""The search compiled, against torch on the same GPU."""

import pytest
import torch

from llmq_kernels.grid_search import op, torch_path
from tests.kernels.test_grid_search import arguments, candidates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kernel_chooses_as_torch_except_at_ties(symmetric: bool, dtype: torch.dtype) -> None:
    from llmq_kernels.grid_search import triton_kernel

    tried = candidates(4, symmetric, dtype)
    groups, costs, first, widest, zeros = arguments((300, 3, 128), tried, 0)
    device = torch.device("cuda")
    moved = (groups.to(device), costs.to(device), (first[0].to(device), first[1].to(device)))
    rest = (widest.to(device), zeros.to(device), tried)
    expected = torch_path.search(*moved, *rest)
    kernel_choice = triton_kernel.search(*moved, *rest)
    same = (kernel_choice[0] == expected[0]) & (kernel_choice[1] == expected[1])
    assert same.float().mean() > 0.99
    for _ in range(20):
        again = op.search(*moved, *rest)
        assert all(map(torch.equal, again, triton_kernel.search(*moved, *rest)))
