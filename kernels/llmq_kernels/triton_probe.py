"""The smallest Triton kernel: run once per device to test whether Triton works."""

import torch
import triton
import triton.language as tl


@triton.jit
def _double(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, 2 * tl.load(source + index))


def run(device: torch.device) -> None:
    """Compile and launch on `device`; raises whatever Triton raises, and RuntimeError for a wrong result."""
    source = torch.arange(16, dtype=torch.float32, device=device)
    target = torch.full_like(source, float("nan"))
    with torch.cuda.device(device):
        _double[(1,)](source, target, SIZE=16, enable_fp_fusion=True)  # explicit, because its default is changing
    if not torch.equal(target, 2 * source):
        raise RuntimeError("a trivial kernel gave a wrong result")
