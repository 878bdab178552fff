"""A few small launches and nothing else: what compute-sanitizer watches, which slows kernels a hundredfold.

    compute-sanitizer --tool racecheck python -m bench.sanitized

K is split among several programs, so that counters and workspaces are used; the kernels for quantizing run once each.
memcheck sees reads and writes out of bounds, initcheck reads of what nobody wrote, racecheck hazards in *shared* memory
only: that programs meet in the right order at a workspace is not for a tool to show, but for the reasoning in
`w4a16/triton_kernel.py` and for repeats that have to agree to the bit.
"""

import torch

from bench.checks import Shape, make_weight, multiply
from llmq_kernels.gptq_block import triton_kernel as block_kernel
from llmq_kernels.gram import triton_kernel as gram_kernel
from llmq_kernels.grid_search import triton_kernel as grid_kernel
from llmq_kernels.grid_search.candidates import Candidates

SHAPES = (Shape(1, 96, 2048, 128), Shape(20, 70, 1000, 32), Shape(80, 64, 512, 128), Shape(3, 64, 512, 128, bits=3))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,)
    for dtype in dtypes:
        for shape in SHAPES if device.type == "cuda" else SHAPES[-1:]:
            multiply(torch.randn(shape.M, shape.K, device=device).to(dtype), make_weight(shape, dtype, device))
    K, N = 128, 40
    columns, codes = torch.randn(1, K, N, device=device), torch.empty(1, K, N, dtype=torch.uint8, device=device)
    ones, groups = torch.ones(1, 1, N, device=device), torch.zeros(1, K, dtype=torch.int32, device=device)
    block_kernel.round_columns(columns, codes, torch.eye(K, device=device)[None], ones, ones, groups, 15, 0, K)
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
