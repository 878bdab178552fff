"""GPTQ's inner loop: round the columns of W one after the other and let those to come make up for the error.

With U the upper Cholesky factor of H⁻¹ (H⁻¹ = UᵀU) and columns in the order in which they are visited

    e = (w_i - ŵ_i) / U_ii        w_k -= e U_ik   for every k > i

reference.py      the definition: column by column, NumPy, float64
torch_path.py     blocks of columns in torch, for any device: what runs on a CPU
triton_kernel.py  128 columns a launch, for CUDA
op.py             the door: checks, and the choice between the two

**Why U, and not the factor of H itself.**  H = RRᵀ, R upper triangular, gives the same codes without an inverse: take
the error against the weight before compensation, and column k is visited at w_k + Σ e_i R_ik / R_kk.  But scales are
searched with the price 1/[H⁻¹]_kk, which is the squared length of a column of R⁻¹ = U.  So U is there, and its form
keeps one array where the other needs two, the weights as they were and as they are.  H⁻¹ itself is never formed.

**Layout.**  All is column after column, (K, N): the rows of W that a program or a vector unit takes at once lie side by
side.  A leading axis E holds experts, each with its own weight, factor, grid and visiting order; E = 1 is common.
"""
