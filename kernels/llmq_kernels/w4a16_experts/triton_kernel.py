"""4-bit experts in Triton: one kernel for few pairs of token and expert, one for many.

Unpacking and zero points are those of `w4a16.triton_kernel`, which explains them: codes become small exact integers in
half precision without a conversion.  The product uses these integers, and the float32 sum of each group is scaled, so
that no weight is ever rounded.

`alone`: one program per pair and run of rows of its expert's weight.  One row of x cannot fill a tensor core, so it
multiplies in float32 registers.  Pairs lie along the fastest axis of the grid: two that share an expert read its rows
at about the same time, the second from L2.

`grouped`: pairs are sorted by expert and divided into blocks of BLOCK_M, each of one expert.  Only the device knows how
many blocks an expert has; the grid has the largest possible number, each program finds its expert from `first_pair`,
and unused programs end immediately.  Nothing synchronizes with the host, so a CUDA graph can capture it.  The weight is
the *left* operand of the product: it goes from registers to the tensor core, never back to shared memory.

Every output belongs to exactly one program and every sum has a fixed order, without atomics: the same bits on every
run, and no races.  Which pairs share a block depends on the routing of other tokens; the sum of a pair does not,
because a column of the product depends on no other column.

Rows beyond N repeat the last row, and their sums are not stored, which is cheaper than a mask.
"""

import triton
import triton.language as tl

from llmq_kernels.w4a16.triton_kernel import _centred, _fields, _grid


@triton.jit
def _own_block(first_pair, block, E, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of block number `block`, the first of its sorted pairs, and the end of the pairs of that expert.

    `first_pair` (E + 1,) is where the pairs of each expert begin; EXPERTS is a power of two, at least E.  The expert is
    E or more for an unused block.
    """
    e = tl.arange(0, EXPERTS)
    begin = tl.load(first_pair + e, mask=e < E, other=0)
    end = tl.load(first_pair + e + 1, mask=e < E, other=0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    until = tl.cumsum(blocks, 0)  # blocks of this expert and of those before it
    owner = tl.sum((until <= block).to(tl.int32), 0)
    first = tl.sum(tl.where(e == owner, begin + (block - until + blocks) * BLOCK_M, 0), 0)
    return owner, first, tl.sum(tl.where(e == owner, end, 0), 0)


@triton.jit
def alone(
    x, token, expert, words, scales, zeros, bias, out, N, K, G, x_stride,
    PLANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row token[p] of x (M, K), float16 or bfloat16, times 4-bit W[expert[p]] (N, K) -> row p of out (P, N).

    words (E, N, Kp / 4) int16, scales and zeros (E, G, N), bias (E, N); rows of x are x_stride apart.
    PLANES   columns of a group / 32, or 0 where one group is the whole row
    Grid: (P, blocks of N).
    """
    BFLOAT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    JOINT: tl.constexpr = 4 if PLANES % 4 == 0 else (2 if PLANES % 2 == 0 else 1)  # planes of a tile with one scale
    p = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    i = tl.arange(0, 32)
    tiles = (K + 127) // 128
    e = tl.load(expert + p).to(tl.int64)
    word = words + e * N * tiles * 32 + row[:, None] * (tiles * 32) + i[None, :]
    column = x + tl.load(token + p).to(tl.int64) * x_stride + i
    total = tl.zeros((BLOCK_N, 32), tl.float32)
    for t in tl.range(0, tiles, num_stages=STAGES):
        field0, field1, field2, field3 = _fields(tl.load(word + t * 32), BFLOAT, ASSEMBLY)
        product = tl.zeros((BLOCK_N, 32), tl.float32)
        for j in tl.static_range(4):
            if j % JOINT == 0:
                group = tl.minimum(t * 4 + j, (K - 1) // 32) // PLANES if PLANES > 0 else 0
                scale, zero = _grid(scales + e * G * N, zeros + e * G * N, group, row, N, HAS_ZEROS, 8)
            X = tl.load(column + (t * 128 + j * 32), mask=t * 128 + j * 32 + i < K, other=0.0)  # (32,)
            field = field0 if j == 0 else (field1 if j == 1 else (field2 if j == 2 else field3))
            product += _centred(field, zero, j % 2 == 1).to(tl.float32) * X.to(tl.float32)[None, :]
            if (j + 1) % JOINT == 0:
                total += product * scale.to(tl.float32)[:, None]
                product = tl.zeros((BLOCK_N, 32), tl.float32)
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + e * N + row).to(tl.float32)
    tl.store(out + p * N + n, result.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def grouped(
    x, token, pairs, first_pair, words, scales, zeros, bias, out, N, K, G, E, x_stride,
    PLANES: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`alone` for many pairs: `pairs` (P,) int64 are all pairs in the order of their experts, see `_own_block`.

    Grid: (largest possible number of blocks of pairs, blocks of N).
    """
    owner, first, end = _own_block(first_pair, tl.program_id(0), E, BLOCK_M, EXPERTS)
    if owner >= E:
        return
    BFLOAT: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    JOINT: tl.constexpr = 4 if PLANES % 4 == 0 else (2 if PLANES % 2 == 0 else 1)
    place = first + tl.arange(0, BLOCK_M)
    present = (place < end)[None, :]
    p = tl.load(pairs + place, mask=place < end, other=0)
    m = tl.load(token + p).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    i = tl.arange(0, 32)
    tiles = (K + 127) // 128
    e = owner.to(tl.int64)
    word = words + e * N * tiles * 32 + row[:, None] * (tiles * 32) + i[None, :]
    column = x + m[None, :] * x_stride + i[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for t in tl.range(0, tiles, num_stages=STAGES):
        field0, field1, field2, field3 = _fields(tl.load(word + t * 32), BFLOAT, ASSEMBLY)
        product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for j in tl.static_range(4):
            if j % JOINT == 0:
                group = tl.minimum(t * 4 + j, (K - 1) // 32) // PLANES if PLANES > 0 else 0
                scale, zero = _grid(scales + e * G * N, zeros + e * G * N, group, row, N, HAS_ZEROS, 8)
            known = present & (t * 128 + j * 32 + i[:, None] < K)
            X = tl.load(column + (t * 128 + j * 32), mask=known, other=0.0)  # (32, BLOCK_M)
            field = field0 if j == 0 else (field1 if j == 1 else (field2 if j == 2 else field3))
            product = tl.dot(_centred(field, zero, j % 2 == 1), X, product)
            if (j + 1) % JOINT == 0:
                total += product * scale.to(tl.float32)[:, None]
                product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + e * N + row).to(tl.float32)[:, None]
    tl.store(out + p[None, :] * N + n[:, None], total.to(out.dtype.element_ty), mask=present & (n[:, None] < N))
