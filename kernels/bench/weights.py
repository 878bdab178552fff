"""A random packed weight in many copies, its exact product, and the poisoned memory that outputs are made in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels.w4a16 import layout
from llmq_kernels.w4a16.packed_weight import PackedWeight

REFERENCE_ROWS = 2048  # of W at once in float64
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 5e-4}  # relative, L2; float32 as tf32


@dataclass(frozen=True)
class Packed:
    """Copies of a 4-bit weight, all of them random: words (C, N, Kp / 4), scales (C, G, N), zeros (C, G, N) or None."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int
    group: int

    @property
    def copies(self) -> int:
        return len(self.words)

    @property
    def nbytes(self) -> int:
        """Of one copy: codes, scales and zero points."""
        parts = [part for part in (self.words, self.scales, self.zeros) if part is not None]
        return sum(part[0].numel() * part.element_size() for part in parts)

    def zeros_of(self, copy: int) -> Tensor | None:
        return None if self.zeros is None else self.zeros[copy]

    def weight(self, copy: int) -> PackedWeight[Tensor]:
        return PackedWeight(self.words[copy], self.scales[copy], self.zeros_of(copy), 4, self.in_features, self.group)


def random_packed(
    N: int, K: int, *, group: int, dtype: torch.dtype, asymmetric: bool, copies: int, device: torch.device
) -> Packed:
    """Codes of every value, scales of either sign, zero points over the whole range."""
    G = -(-K // group)
    shape = (copies, N, layout.words_per_row(K, 4))
    words = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device)
    scales = (torch.rand(copies, G, N, device=device) * 0.02 + 0.002).to(dtype)
    scales[:, :, ::7] *= -1
    zeros = torch.randint(0, 16, (copies, G, N), dtype=torch.int16, device=device) if asymmetric else None
    return Packed(words, scales, zeros, K, group)


def copies_for(nbytes: int, cache: int) -> int:
    """The number of copies, at least two, after which nothing of the first is left in a cache of `cache` bytes."""
    return max(2, -(-cache // max(1, nbytes)))


def codes(packed: Packed, copy: int = 0) -> Tensor:
    """(N, K) uint8."""
    return layout.unpack(packed.words[copy], 4, packed.in_features)


def exact_product(x: Tensor, packed: Packed, copy: int = 0) -> Tensor:
    """x Wᵀ (M, N) in float64, on the device, a few rows of W at a time."""
    N, K = packed.words.shape[1], packed.in_features
    group = torch.arange(K, device=x.device) // packed.group
    product = torch.empty(len(x), N, dtype=torch.float64, device=x.device)
    X, all_codes, zeros = x.double(), codes(packed, copy), packed.zeros_of(copy)
    for start in range(0, N, REFERENCE_ROWS):
        n = slice(start, min(start + REFERENCE_ROWS, N))
        zero = 8.0 if zeros is None else zeros[:, n].double()[group].T  # (R, K)
        W = (all_codes[n].double() - zero) * packed.scales[copy][:, n].double()[group].T
        product[:, n] = X @ W.T
    return product


def relative_error(product: Tensor, exact: Tensor) -> float:
    """‖product − exact‖ / ‖exact‖ in float64; NaN where `product` has one."""
    return float((product.double() - exact).norm() / exact.norm())


def poison(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a block of that size with NaN and free it, so that the next output of its size starts as NaN.

    The allocator picks the same block again as long as nothing else is freed in between.  In particular no other tensor
    of that size may be freed: it could hold the right values, and a kernel that writes nothing would look right.
    """
    torch.full(shape, float("nan"), dtype=dtype, device=device)
