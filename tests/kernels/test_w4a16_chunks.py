"""Chunks of dequantized weight: whole waves of output tiles, and as few as for the whole weight."""

import pytest

from llmq_kernels.w4a16 import chunks

LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (8192, 28672))  # 8B, 70B
ROWS = (513, 576, 640, 1000, 1024, 1152, 1280, 1536, 1920, 2047, 2048, 4096, 8192, 20000)
H200 = {"processors": 132, "resident_bytes": 16 << 20}


def split(M: int, N: int, K: int, **machine: int) -> list[int]:
    """The rows of every chunk."""
    size = chunks.rows_per_chunk(M, N, 2 * K, **machine)
    return [min(size, N - start) for start in range(0, N, size)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_no_chunk_begins_a_wave_that_it_does_not_fill(M: int, layer: tuple[int, int]) -> None:
    """Another tile of every chunk would exceed its last wave; only the last chunk and all of W are smaller."""
    N, K = layer
    down = -(-M // 128)
    for size in split(M, N, K, **H200)[:-1]:
        idle = -(size // 256 * down) % 132
        limited = (size + 256) * 2 * K > chunks.MOST_BYTES
        assert size % 256 == 0
        assert idle < down or limited
    whole, taken = (chunks.waves(M, N, size, 132) for size in (N, split(M, N, K, **H200)[0]))
    assert whole <= taken <= whole + 2


def test_chunks_need_as_many_waves_as_the_whole_weight() -> None:
    """Over all layers and rows; rounding up needed 25 waves instead of 14 for gate and up at 2048 rows."""
    whole = sum(chunks.waves(M, N, N, 132) for M in ROWS for N, _ in LAYERS)
    taken = sum(chunks.waves(M, N, split(M, N, K, **H200)[0], 132) for M in ROWS for N, K in LAYERS)
    assert taken <= 1.005 * whole
    assert chunks.waves(2048, 28672, 2304, 132) == 25
    assert chunks.waves(2048, 28672, split(2048, 28672, 4096, **H200)[0], 132) == 14


def test_few_rows_use_small_chunks_and_many_rows_the_whole_weight() -> None:
    assert split(1024, 28672, 4096, **H200) == [4096] * 7  # 32 MB; 16 tiles by 8 of 132
    assert split(2048, 28672, 4096, **H200) == [28672]  # 224 MB
    assert split(4096, 57344, 8192, **H200) == [15616] * 3 + [10496]  # 896 MB do not fit


def test_memory_is_bounded() -> None:
    for M in (1, 64, *ROWS, 100_000):
        for N, K in (*LAYERS, (150_000, 16384), (100, 2_000_000)):
            size = split(M, N, K, **H200)[0]
            assert size * 2 * K <= chunks.MOST_BYTES or size == min(N, 256)


def test_any_machine_and_small_weights() -> None:
    assert split(9, 100, 200, processors=0, resident_bytes=1) == [100]
    assert split(100_000, 600, 64, processors=1, resident_bytes=1 << 20) == [600]
    assert split(200, 1, 64, processors=2, resident_bytes=0) == [1]
