"""Float32 products without TF32, and with it where a result is only compared.

`torch.backends.cuda.matmul` may be set to TF32, with ten bits of mantissa instead of twenty-three: enough to run a
network, but such an error can move a weight across the middle between two codes, which changes the quantized model.
Products that decide between finished results may use TF32: their errors of 2**-11 average out over a whole weight.
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
    with _cuda_products("ieee", tf32=False):
        yield


@contextmanager
def with_tf32() -> Iterator[None]:
    """Inside, cuBLAS multiplies float32 in TF32, about eight times as fast; like `without_tf32` in all else."""
    with _cuda_products("tf32", tf32=True):
        yield


@contextmanager
def _cuda_products(precision: str, *, tf32: bool) -> Iterator[None]:
    setting = torch.backends.cuda.matmul
    name, value = ("fp32_precision", precision) if hasattr(setting, "fp32_precision") else ("allow_tf32", tf32)
    before = getattr(setting, name)  # torch before 2.9 knows allow_tf32 only; later ones refuse to mix the two
    setattr(setting, name, value)
    try:
        yield
    finally:
        setattr(setting, name, before)
