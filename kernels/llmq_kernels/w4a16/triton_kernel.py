"""The product on a GPU: weights go from memory through registers into the tensor cores and are never stored unpacked.

`reference.py` draws the layout and defines the result; `gpu.py` launches the kernels.

**Weights are the left operand of every dot**, out = (W xᵀ)ᵀ: tensor cores read the left operand from registers, where
unpacking leaves it.  A tile of 128 columns of 4 bits is 32 words per row.  One `lop3` puts code c of two neighbouring
columns under the exponent of 1024 (float16: 1024 + c, or 1024 + 16 c for the odd fields, which saves their shift) or
of 128 (bfloat16).  Subtracting 1024 + zero gives c - zero, a small integer and exact.  No integer is converted.

**Scales after or before the dot.**  After: the dot multiplies exact integers, and the float32 product of each group is
scaled; more accurate than any dequantized weight, and best for few rows.  Before: the weight is scaled and rounded once
to x's dtype; one operation per weight instead of one per product, best for many rows.

**Split K, the same bits on every run.**  SPLITS programs share an output tile.  Each writes its float32 sum to a
separate slice of a workspace, passes a barrier and increments a counter.  The last one adds the slices from first to
last, so the order of arrival does not matter, and sets the counter to 0 for the next launch.  Why there is no race:

* Each thread's stores to the slice precede the barrier of its program; the barrier orders them before the atomic of
  the thread that counts (without it, stores of other warps might still be in flight); the atomic releases them at GPU
  scope.  Release is cumulative: it covers everything that the thread has observed, so the whole slice.
* The atomic of the last program acquires, hence sees what every earlier one released: atomics on one counter form one
  release sequence.  Its threads get the count through shared memory and a barrier, which orders their loads after it.
* Slices are read with `.cg`, from L2: L1 is not coherent, and may hold lines of an earlier launch's workspace.
* All other programs are done with the counter when it is reset; the next launch in the stream starts after this one.

Rows beyond N read the words and scales of row 0, and their sums are not stored, which is cheaper than a mask.  Columns
beyond K hold code 0 and are multiplied by zeros in x.  Zero points 0 .. 2**bits, which cover every format, are exact;
others are if 128 + zero (bfloat16) or 1024 + zero (float16) is.  `ASSEMBLY` false is for Triton's interpreter, which
has no inline assembly: the same values by plain arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def _fields(words, BFLOAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Words (R, 32) int16 -> field 0 .. 3 of each as (R, 32): 1024 + c, 1024 + 16 c, 1024 + c, 1024 + 16 c; or 128 + c.

    Table 0xEA of lop3 is (a & b) | c; `pack=2` passes two neighbouring words in one register.
    """
    if ASSEMBLY and BFLOAT:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 one, two, three;
            shr.u32 one, $4, 4; shr.u32 two, $4, 8; shr.u32 three, $4, 12;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xEA;
            lop3.b32 $1, one, 0x000f000f, 0x43004300, 0xEA;
            lop3.b32 $2, two, 0x000f000f, 0x43004300, 0xEA;
            lop3.b32 $3, three, 0x000f000f, 0x43004300, 0xEA;
            }""",
            "=&r,=&r,=&r,=&r,r", [words], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 two; shr.u32 two, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xEA;
            lop3.b32 $2, two, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $3, two, 0x00f000f0, 0x64006400, 0xEA;
            }""",
            "=&r,=&r,=&r,=&r,r", [words], (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        v = words.to(tl.int32)
        T: tl.constexpr = tl.bfloat16 if BFLOAT else tl.float16
        base: tl.constexpr = 128 if BFLOAT else 1024
        step: tl.constexpr = 1 if BFLOAT else 16
        odd1, odd3 = base + (v >> 4 & 15) * step, base + (v >> 12 & 15) * step
        return (base + (v & 15)).to(T), odd1.to(T), (base + (v >> 8 & 15)).to(T), odd3.to(T)


@triton.jit
def _prefetch(scales, zeros, t, row, N, K, PLANES: tl.constexpr, HAS_ZEROS: tl.constexpr):
    """Prefetch scales and zero points of tile t to L1: too narrow for asynchronous copies, they stall on a miss."""
    CODE: tl.constexpr = "prefetch.global.L1 [$1]; mov.u32 $0, 0;"
    for j in tl.static_range(0, 4, 4 if PLANES % 4 == 0 else (2 if PLANES % 2 == 0 else 1)):
        place = tl.minimum(t * 4 + j, (K - 1) // 32) // PLANES * N + row
        tl.inline_asm_elementwise(CODE, "=r,l", [scales + place], tl.int32, is_pure=False, pack=1)
        if HAS_ZEROS:
            tl.inline_asm_elementwise(CODE, "=r,l", [zeros + place], tl.int32, is_pure=False, pack=1)


@triton.jit
def _grid(scales, zeros, group, n, N, HAS_ZEROS: tl.constexpr, MIDDLE: tl.constexpr):
    """Scale and zero point of rows n (R,) in one group, (R,) each; the zero as float32 by adding bits, not by I2F."""
    scale = tl.load(scales + group * N + n)
    if HAS_ZEROS:
        bits = tl.load(zeros + group * N + n).to(tl.int32) + 0x4B400000  # 3 * 2**22 + zero
        zero = bits.to(tl.float32, bitcast=True) - 12582912.0
    else:
        zero = tl.full(n.shape, MIDDLE, tl.float32)
    return scale, zero


@triton.jit
def _centred(field, zero, ODD: tl.constexpr):
    """Field of `_fields` -> code - zero (R, 32) in the same dtype, exact; one operation per two columns."""
    if field.dtype == tl.bfloat16:
        return field - (128.0 + zero)[:, None].to(tl.bfloat16)
    elif ODD:
        return field * 0.0625 - (64.0 + zero)[:, None].to(tl.float16)
    else:
        return field - (1024.0 + zero)[:, None].to(tl.float16)


@triton.jit
def _scaled(W, scale):
    """W (R, 32) times scale (R,), rounded once to W's dtype."""
    if scale.dtype == W.dtype:
        return W * scale[:, None]
    else:
        return (W.to(tl.float32) * scale.to(tl.float32)[:, None]).to(W.dtype)


@triton.jit
def _inputs(x, k, m, M, K, EVEN_K: tl.constexpr):
    """x[m, k] as (columns, rows), from pointers of that shape and k (columns,), m (rows,); zero beyond M and K."""
    known = m[None, :] < M if EVEN_K else (m[None, :] < M) & (k[:, None] < K)
    return tl.load(x, mask=known, other=0.0)


@triton.jit
def _store(total, bias, out, m, n, M, N, HAS_BIAS: tl.constexpr):
    """Total (R, C) for rows n of W and rows m of x -> out (M, N), with bias (N,)."""
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    inside = (m[None, :] < M) & (n[:, None] < N)
    tl.store(out + m[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish(total, bias, out, workspace, counters, m, n, M, N, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr):
    """Store the sum of all splits, see above: workspace (SPLITS, M, N) float32, one counter for each output tile."""
    if SPLITS == 1:
        _store(total, bias, out, m, n, M, N, HAS_BIAS)
    else:
        place = m[None, :] * N + n[:, None]
        inside = (m[None, :] < M) & (n[:, None] < N)
        tl.store(workspace + tl.program_id(2) * M * N + place, total, mask=inside)
        tl.debug_barrier()
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            joined = tl.zeros(total.shape, tl.float32)
            if total.shape[1] <= 32:  # all loads at once; for more rows that would take too many registers
                for split in tl.static_range(SPLITS):
                    joined += tl.load(workspace + split * M * N + place, mask=inside, other=0.0, cache_modifier=".cg")
            else:
                for split in tl.range(0, SPLITS, num_stages=1, loop_unroll_factor=1):
                    joined += tl.load(workspace + split * M * N + place, mask=inside, other=0.0, cache_modifier=".cg")
            _store(joined, bias, out, m, n, M, N, HAS_BIAS)
            tl.store(counter, 0)


@triton.jit(do_not_specialize=["M"])
def fused4(
    x, words, scales, zeros, bias, out, workspace, counters, M, N, K, x_stride,
    PLANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    SCALE_AFTER: tl.constexpr, ASSEMBLY: tl.constexpr, PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x (M, K) float16 or bfloat16, rows x_stride apart, times 4-bit W (N, K) -> out (M, N).

    PLANES   columns of a group / 32, or 0 where one group is the whole row
    EVEN_K   K is a multiple of 128
    Grid: (blocks of M, blocks of N, SPLITS); blocks of M run next to each other, so that their weights come from L2.
    """
    BFLOAT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    JOINT: tl.constexpr = 4 if PLANES % 4 == 0 else (2 if PLANES % 2 == 0 else 1)  # planes of a tile with one scale
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(n < N, n, 0)
    i = tl.arange(0, 32)
    tiles = (K + 127) // 128
    first, last = tiles * tl.program_id(2) // SPLITS, tiles * (tl.program_id(2) + 1) // SPLITS
    word = words + row[:, None] * (tiles * 32) + i[None, :]
    column = x + m[None, :] * x_stride + i[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PLANES == 0:
        scale, zero = _grid(scales, zeros, 0, row, N, HAS_ZEROS, 8)
    elif PREFETCH:
        for ahead in tl.static_range(STAGES):
            _prefetch(scales, zeros, first + ahead, row, N, K, PLANES, HAS_ZEROS)
    for t in tl.range(first, last, num_stages=STAGES):
        field0, field1, field2, field3 = _fields(tl.load(word + t * 32), BFLOAT, ASSEMBLY)
        product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if PREFETCH and PLANES > 0:
            _prefetch(scales, zeros, t + STAGES, row, N, K, PLANES, HAS_ZEROS)
        for j in tl.static_range(4):
            k = t * 128 + j * 32
            X = _inputs(column + k, k + i, m, M, K, EVEN_K)  # (32, BLOCK_M)
            if PLANES > 0 and j % JOINT == 0:
                plane = t * 4 + j if EVEN_K else tl.minimum(t * 4 + j, (K - 1) // 32)
                scale, zero = _grid(scales, zeros, plane // PLANES, row, N, HAS_ZEROS, 8)
            field = field0 if j == 0 else (field1 if j == 1 else (field2 if j == 2 else field3))
            W = _centred(field, zero, j % 2 == 1)  # (BLOCK_N, 32)
            if PLANES == 0:
                total = tl.dot(W, X, total)
            elif not SCALE_AFTER:
                total = tl.dot(_scaled(W, scale), X, total)
            else:
                product = tl.dot(W, X, product)
                if (j + 1) % JOINT == 0:
                    total += product * scale.to(tl.float32)[:, None]
                    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PLANES == 0:
        total *= scale.to(tl.float32)[:, None]
    _finish(total, bias, out, workspace, counters, m, n, M, N, HAS_BIAS, SPLITS)


@triton.jit
def _words(word, BITS: tl.constexpr):
    """The words of one tile that `_piece` takes, from pointers (R, 1) to its first: the low ones, the high ones."""
    i = tl.arange(0, 32 if BITS >= 4 else 16)[None, :]
    low = tl.load(word + i)
    high = low
    if BITS == 3:
        high = tl.load(word + 16 + i % 8)  # the 1-bit plane; each word twice, for its two fields of eight columns
    elif BITS == 8:
        high = tl.load(word + 32 + i)
    return low, high


@triton.jit
def _piece(low, high, p: tl.constexpr, zero, BITS: tl.constexpr):
    """Code - zero of the p-th run of 32 columns of a tile (16 of 2 and 3 bits): float32 (R, 32 or 16), exact.

    2**23 + code is a float whose bits are those of 2**23 with the code in them, so again nothing is converted.
    """
    if BITS == 8:
        code = (low if p % 2 == 0 else high).to(tl.int32) >> 8 * (p // 2) & 255
    elif BITS == 4:
        code = low.to(tl.int32) >> 4 * p & 15
    else:
        code = low.to(tl.int32) >> 2 * p & 3
        if BITS == 3:
            code |= (high.to(tl.int32) >> 2 * p + (tl.arange(0, 16) // 8)[None, :] & 1) << 2
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)[:, None]


@triton.jit(do_not_specialize=["M"])
def fused_planes(
    x, words, scales, zeros, bias, out, workspace, counters, M, N, K, x_stride,
    PLANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`fused4` for 2, 3 and 8 bits, in a simpler way: every 32 columns are scaled after their dot."""
    RUN: tl.constexpr = 32 if BITS == 8 else 16  # columns of a piece
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.where(n < N, n, 0)
    i = tl.arange(0, RUN)
    tiles = (K + 127) // 128
    first, last = tiles * tl.program_id(2) // SPLITS, tiles * (tl.program_id(2) + 1) // SPLITS
    word = words + row[:, None] * (tiles * 8 * BITS)
    column = x + m[None, :] * x_stride + i[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PLANES == 0:
        scale, zero = _grid(scales, zeros, 0, row, N, HAS_ZEROS, 1 << BITS - 1)
    for t in tl.range(first, last, num_stages=STAGES):
        low, high = _words(word + t * 8 * BITS, BITS)
        for p in tl.static_range(128 // RUN):
            k = t * 128 + p * RUN
            X = _inputs(column + k, k + i, m, M, K, EVEN_K)  # (RUN, BLOCK_M)
            if p * RUN % 32 == 0:
                product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                if PLANES > 0:
                    plane = tl.minimum(k // 32, (K - 1) // 32)
                    scale, zero = _grid(scales, zeros, plane // PLANES, row, N, HAS_ZEROS, 1 << BITS - 1)
            product = tl.dot(_piece(low, high, p, zero, BITS).to(x.dtype.element_ty), X, product)
            if (p + 1) * RUN % 32 == 0:
                total += product * scale.to(tl.float32)[:, None]
    _finish(total, bias, out, workspace, counters, m, n, M, N, HAS_BIAS, SPLITS)


@triton.jit(do_not_specialize=["first_row", "R"])
def dequantize(
    words, scales, zeros, out, first_row, R, N, K,
    PLANES: tl.constexpr, HAS_ZEROS: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows first_row .. first_row + R - 1 of W -> out (R, K) in out's dtype.  Grid: (blocks of R, tiles of columns).

    The product of scale and integer is a float32, exact where scales have 16 bits, and is rounded once.
    """
    RUN: tl.constexpr = 32 if BITS >= 4 else 16
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(r < R, first_row + r, first_row)
    i = tl.arange(0, RUN)
    t, tiles = tl.program_id(1), (K + 127) // 128
    low, high = _words(words + n[:, None] * (tiles * 8 * BITS) + t * 8 * BITS, BITS)
    for p in tl.static_range(128 // RUN):
        k = t * 128 + p * RUN
        if p * RUN % 32 == 0:
            plane = tl.minimum(k // 32, (K - 1) // 32)
            group = plane // PLANES if PLANES > 0 else 0
            scale, zero = _grid(scales, zeros, group, n, N, HAS_ZEROS, 1 << BITS - 1)
        W = _piece(low, high, p, zero, BITS) * scale.to(tl.float32)[:, None]  # (BLOCK_N, RUN)
        inside = (r[:, None] < R) & (k + i[None, :] < K)
        tl.store(out + r[:, None] * K + k + i[None, :], W.to(out.dtype.element_ty), mask=inside)
