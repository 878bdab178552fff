"""A few launches of the product for one row at the size of gate and up in Llama 3.1 8B, for a profiler.

ncu --kernel-name regex:fused4 --launch-skip 2 --launch-count 1 python -m bench.one_launch
"""

import torch

from bench.plan import LLAMA_8B
from bench.weights import random_packed
from llmq_kernels.w4a16 import op


def main() -> None:
    device, (N, K) = torch.device("cuda"), LLAMA_8B["gate_up"]
    packed = random_packed(N, K, group=128, dtype=torch.bfloat16, asymmetric=False, copies=3, device=device)
    x = torch.randn(1, K, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        for copy in range(packed.copies):
            op.linear(x, packed.weight(copy), None)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
