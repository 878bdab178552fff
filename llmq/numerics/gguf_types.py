"""The block types of GGUF that llmq rounds in: grids whose form the file fixes, with no bit of freedom beside.

A *superblock* of 256 columns has sub-blocks whose scales (and offsets) are small integers times one fp16 number that
they share, so that a scale costs a quarter of a bit a weight and not a whole one.  The others are plain affine grids.

Source: github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SUPERBLOCK = 256  # columns


@dataclass(frozen=True)
class BlockType:
    """One type: its grid, and what `columns` columns of a row take in the file.

    bits       of a code
    group      columns that share a scale
    symmetric  whether the zero is fixed in the middle; if not, a sub-block has an offset of its own
    columns    of a block: what a row is a multiple of
    nbytes     of a block
    fallback   what takes its place where `columns` does not divide a row: finer, never coarser
    """

    bits: int
    group: int
    symmetric: bool
    columns: int
    nbytes: int
    fallback: str | None = None

    @property
    def two_level(self) -> bool:
        return self.columns == SUPERBLOCK


BLOCK_TYPES: Mapping[str, BlockType] = {
    "q4_k": BlockType(4, 32, False, SUPERBLOCK, 144, "q5_0"),
    "q5_k": BlockType(5, 32, False, SUPERBLOCK, 176, "q8_0"),
    "q6_k": BlockType(6, 16, True, SUPERBLOCK, 210, "q8_0"),
    "q5_0": BlockType(5, 32, True, 32, 22),
    "q8_0": BlockType(8, 32, True, 32, 34),
}
