"""y = x Wᵀ + bias, with W stored in 2, 3, 4 or 8 bits and x in 16 or 32.

reference.py  the definition: layout and product, NumPy, float64
layout.py     the layout in torch, for loading
cpu.py        the product in torch, for any device
op.py         the op that callers use: checks, a fake for tracing, the gradient with respect to x
"""
