"""GPTQ's inner loop: quantize the columns of W one after the other; later columns compensate for the error.

With U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU) and columns in the order in which they are quantized

    e = (w_i - ŵ_i) / U_ii        w_k -= e U_ik   for every k > i

reference.py      the definition: column by column, NumPy, float64
problem.py        the arguments as one checked value
torch_path.py     blocks of columns in torch, for any device; used on CPUs
triton_kernel.py  128 columns per launch, for CUDA
op.py             the entry point: the choice between the two

**Why U, and not the factor of H itself.**  H = RRᵀ, R upper triangular, gives the same codes without an inverse: take
the error against the weight before compensation, and quantize column k from w_k + Σ e_i R_ik / R_kk.  But the search
for scales needs the cost 1/[H⁻¹]_kk, the squared length of a column of R⁻¹ = U.  So U is there already, and its form
needs one array, where the other needs two: the original and the current weights.  H⁻¹ itself is never formed.

**Layout.**  Arrays are stored by columns, (K, N): the rows of W that a program or a vector unit processes together are
contiguous.  A leading axis E holds experts, each with its own weight, factor, grid and column order; E = 1 is common.
"""
