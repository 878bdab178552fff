"""Choose the scale and zero point of each group of weights by trying some hundred candidates.

    error(s, z) = s² Σ_j cost_j (clip(round(w_j / s), -z, levels - z) - w_j / s)²

reference.py      the definition: one group, one candidate after the other, NumPy
candidates.py     which scales and zero points are tried
torch_path.py     all groups at once, candidate by candidate, for any device; used on CPUs
triton_kernel.py  a group stays in registers while all candidates are tried, for CUDA
op.py             the entry point: checks, and the choice between the two

In torch every candidate reads and writes all weights several times: the 141 candidates of an asymmetric grid move 7 kB
per weight.  In registers, each weight is read once.
"""
