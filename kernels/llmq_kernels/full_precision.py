"""Products in float32 that are products in float32.

`torch.backends.cuda.matmul` may be set to TF32, ten bits instead of twenty-three: good enough for a network, but an
error that moves a weight across the middle between two codes is a different model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, cuBLAS multiplies float32 in float32; what the process had chosen is back afterwards.

    The choice belongs to the process and not to a thread, so another thread's products in the meantime are exact as
    well.  A product's precision is fixed when it is launched: nothing waits for the GPU.
    """
    setting = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(setting, "fp32_precision") else ("allow_tf32", False)
    before = getattr(setting, name)  # torch before 2.9 knows allow_tf32 only; later ones refuse to mix the two
    setattr(setting, name, exact)
    try:
        yield
    finally:
        setattr(setting, name, before)
