"""Kernels for weights of 2 to 8 bits.  Never imports llmq; importing it loads neither torch nor triton.

One folder per op.  Its `reference.py` (NumPy, float64) defines what the op computes; the other versions in the folder
compute the same numbers faster, and tests compare them with the reference.  `op.py` is the entry point: it checks the
arguments once, registers a torch custom op where a model needs one, and calls a backend.

Terms: a *code* is one quantized value, an unsigned integer; a weight is scale * (code - zero point); a *group* is a run
of columns that share a scale and a zero point.
"""
