"""XᵀX: the second moment of a layer's inputs, summed over batches in float32.

reference.py      the definition, NumPy, float64
triton_kernel.py  float16 and bfloat16 on CUDA, by tiles on and above the diagonal
op.py             the entry point: checks, the choice of a path, and `mirror` for the lower triangle
"""
