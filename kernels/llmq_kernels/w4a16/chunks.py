"""How many rows of W to dequantize at a time, so that the matrix products leave no multiprocessor idle.

cuBLAS computes a product in output tiles, one per multiprocessor at a time; all multiprocessors together are a *wave*.
A product of a few more tiles than a wave takes as long as two waves.  So a chunk of W is rounded down to whole waves.

    M rows of x             chunk of W
    fewer than WHOLE_ROWS   the smallest with the fewest waves in total: it is still in the L2 cache when it is read
    more                    the largest with the fewest waves; all of W if it fits.  Memory traffic matters little here,
                            and every chunk costs two launches

The size of cuBLAS's tiles is not documented; GEMM_TILE is what it uses for large products on current GPUs.
"""

import functools
from collections.abc import Iterator

GEMM_TILE = (128, 256)  # rows of x, rows of W
WHOLE_ROWS = 2048
MOST_BYTES = 1 << 28  # of dequantized weight at a time
BEYOND_CACHE = 4  # a chunk of more than one wave may be this many times what stays in the cache


@functools.lru_cache(maxsize=1 << 12)
def rows_per_chunk(M: int, N: int, row_bytes: int, processors: int, resident_bytes: int) -> int:
    """Rows of W (N, K) per chunk for x of M rows, at most N; `row_bytes` of one dequantized row.

    `resident_bytes` is how much dequantized weight stays in the L2 cache of the GPU.
    """
    tile_bytes = GEMM_TILE[1] * row_bytes
    tiles, most = -(-N // GEMM_TILE[1]), max(1, MOST_BYTES // tile_bytes)
    cached = BEYOND_CACHE * resident_bytes // tile_bytes
    many = M >= WHOLE_ROWS
    sizes = list(_whole_waves(M, min(tiles, most), processors))
    if not many:
        sizes = [size for size in sizes if size <= max(cached, sizes[0])]
    best = min(sizes, key=lambda size: (waves(M, N, size * GEMM_TILE[1], processors), -size if many else size))
    return min(N, best * GEMM_TILE[1])


def waves(M: int, N: int, rows: int, processors: int) -> int:
    """The waves of all products together, for chunks of `rows` rows of W."""
    down = -(-M // GEMM_TILE[0])
    whole, rest = divmod(N, rows)
    parts = [-(-part // GEMM_TILE[1]) * down for part in (rows, rest)]  # output tiles of a chunk, of the last one
    full, last = (-(-tiles // max(1, processors)) for tiles in parts)
    return whole * full + last


def _whole_waves(M: int, most: int, processors: int) -> Iterator[int]:
    """Tiles along N that fill 1, 2, … waves as far as they go, at most `most`; ascending."""
    down, wave, size = -(-M // GEMM_TILE[0]), 0, 0
    while size < most:
        wave += 1
        filled = min(most, max(1, processors) * wave // down)
        if filled > size:
            size = filled
            yield size
