"""Kernels for weights of 2 to 8 bits.  Never imports llmq; importing it loads neither torch nor triton.

One folder an op.  Its `reference.py` (NumPy, float64) defines what the op computes; every other file in the folder is
a faster way to the same numbers, and a test holds it to the reference.  `op.py` is the door: it checks the arguments
once, is known to torch as a custom op, and calls a backend of the signature that `reference.py` sets.
"""
