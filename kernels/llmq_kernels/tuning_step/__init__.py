"""One step of tuning the codes of a weight: the gradient in, the next weight out, in one pass through memory.

A code is q = clip(round(q₀ + v)), and v follows Adam (Kingma & Ba 2015, arXiv:1412.6980), with the gradient passed
straight through the rounding.  With G (N, K) the gradient of the weight s (q - z):

    g = G s, but 0 where q₀ + v is out of the range of codes and would go further
    m ← β₁ m + (1 - β₁) g        u ← β₂ u + (1 - β₂) g²        v ← v - rate m' / (√u' + ε)      ' : without bias

reference.py      the definition: NumPy, float64
triton_kernel.py  the kernel, for CUDA
op.py             the entry point: what it takes

There is no torch path here: `llmq.algorithms.kl_tuning` has it, for all grids.  Operation by operation it moves
178 bytes per weight; the kernel moves 30, with v, m and u in float32 and gradient and weight in 16 bits.
"""
