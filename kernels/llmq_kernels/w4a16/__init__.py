"""y = x Wᵀ + bias, with W stored in 2 to 8 bits and x in 16 or 32.

packed_weight.py  the weight as one value
reference.py      the definition: layout and product, NumPy, float64
layout.py         the layout in torch, for loading
cpu.py            the product in torch, for any device
small_batches.py  small batches on a CPU, by torch's own products: int4pack.py, int8pack.py
gpu.py            which kernel for how many rows, and its launch; triton_kernel.py has the kernels
configs.py        their tile sizes, from configs.json; tune.py searches those of a GPU
counters.py       counters for programs that share an output tile
op.py             the op that callers use: checks, a fake for tracing, the gradient with respect to x
"""
