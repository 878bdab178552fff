"""Float32 products without TF32.

`torch.backends.cuda.matmul` may be set to TF32, with ten bits of mantissa instead of twenty-three: enough to run a
network, but such an error can move a weight across the middle between two codes, which changes the quantized model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, cuBLAS multiplies float32 in float32; afterwards the setting of the process is restored.

    The setting belongs to the process, not to a thread, so products of other threads are exact meanwhile too.  The
    precision of a product is fixed when it is launched, so nothing synchronizes with the GPU.
    """
    setting = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(setting, "fp32_precision") else ("allow_tf32", False)
    before = getattr(setting, name)  # torch before 2.9 knows allow_tf32 only; later ones refuse to mix the two
    setattr(setting, name, exact)
    try:
        yield
    finally:
        setattr(setting, name, before)
