"""A few small launches for compute-sanitizer, which slows kernels a hundredfold.

    compute-sanitizer --tool racecheck python -m bench.sanitized

K is split among several programs, so that counters and workspaces are used; the kernels for quantizing run once each.
memcheck finds reads and writes out of bounds, initcheck reads of uninitialized memory, racecheck hazards in *shared*
memory only.  No tool can show that programs use a workspace in the right order: see the reasoning in
`w4a16/triton_kernel.py`, and the repeats that must have the same bits.
"""

import torch

from bench.checks import Shape, make_weight, multiply
from llmq_kernels.gptq_block import triton_kernel as block_kernel
from llmq_kernels.gptq_block.problem import Problem
from llmq_kernels.gram import triton_kernel as gram_kernel
from llmq_kernels.grid_search import triton_kernel as grid_kernel
from llmq_kernels.grid_search.candidates import Candidates

SHAPES = (Shape(1, 96, 2048, 128), Shape(20, 70, 1000, 32), Shape(80, 64, 512, 128), Shape(3, 64, 512, 128, bits=3))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,)
    for dtype in dtypes:
        for shape in SHAPES if device.type == "cuda" else SHAPES[-1:]:
            multiply(torch.randn(shape.M, shape.K, device=device).to(dtype), *make_weight(shape, dtype, device))
    K, N = 128, 40
    columns, codes = torch.randn(1, K, N, device=device), torch.empty(1, K, N, dtype=torch.uint8, device=device)
    ones, groups = torch.ones(1, 1, N, device=device), torch.zeros(1, K, dtype=torch.int32, device=device)
    problem = Problem(columns, torch.eye(K, device=device)[None], ones, ones, groups, 15)
    block_kernel.quantize_columns(problem, codes, 0, K)
    gram_kernel.update(torch.zeros(64, 64, device=device), torch.randn(96, 64, device=device).half(), upper_only=True)
    some, costs = torch.rand(20, 2, device=device) + 1, torch.ones(2, 32, device=device)
    tried = Candidates(15, False, (0.8, 1.0), (-0.1, 0.1), (-1, 0, 1), 1e-9, torch.float16)
    groups = torch.randn(20, 2, 32, device=device)
    grid_kernel.search(groups, costs, (some, some.round()), some, some.round(), tried)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
