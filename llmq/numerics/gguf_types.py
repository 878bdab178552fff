"""The block types of GGUF that llmq quantizes to, and the recipes that choose among them.

The file fixes the grid of a block type completely.

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


@dataclass(frozen=True)
class Recipe:
    """Block types by the role of a weight (`gguf/recipes.py`): most weights, those that its rule favours, q, k and v
    stored as one weight, and the head."""

    usual: str
    generous: str
    fused: str
    head: str


RECIPES: Mapping[str, Recipe] = {
    "gguf:q4_k": Recipe("q4_k", "q4_k", "q4_k", "q6_k"),
    "gguf:q5_k": Recipe("q5_k", "q5_k", "q5_k", "q6_k"),
    "gguf:q6_k": Recipe("q6_k", "q6_k", "q6_k", "q6_k"),
    "gguf:q4_k_m": Recipe("q4_k", "q6_k", "q5_k", "q6_k"),
    "gguf:q5_k_m": Recipe("q5_k", "q6_k", "q6_k", "q6_k"),
}

GGUF = "gguf"
"""The format of .gguf files that hold the quantized values of the other formats."""

GGUF_GRIDS = tuple(RECIPES)
"""Formats of .gguf files with grids that no other format can hold."""
