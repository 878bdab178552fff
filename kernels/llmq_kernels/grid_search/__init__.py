"""Choose the scale and zero of each group of weights by trying some hundred of them.

    error(s, z) = s² Σ_j cost_j (clip(round(w_j / s), -z, levels - z) - w_j / s)²

reference.py      the definition: one group, one candidate after the other, NumPy
torch_path.py     all groups at once, candidate by candidate, for any device: what runs on a CPU
triton_kernel.py  a group stays in registers while all candidates are tried, for CUDA
op.py             the door: which candidates there are, checks, and the choice between the two

In torch every candidate reads and writes all weights several times: 141 candidates of an asymmetric grid move 7 kB for
each weight.  In registers, each weight is read once.
"""
