"""Each row of x times the packed weight of one of E experts: the linear layers of mixture-of-experts models.

reference.py      the definition: NumPy, float64
cpu.py            the product in torch, for any device, expert by expert
triton_kernel.py  4 bits on CUDA: one kernel for few pairs of token and expert, one for many
gpu.py            which of the two, with which tiles, and the launch
op.py             the op that callers use: checks, a fake for tracing, the gradient with respect to x

The words of each expert have the layout of `w4a16`; `w4a16.packed_weight` holds a stack of experts too.
"""
