"""The block types of GGUF that llmq quantizes to, and the recipes that choose among them.

A block type fixes the grid completely.

A *superblock* has 256 columns in sub-blocks.  The scales (and offsets) of the sub-blocks are small integers times an
fp16 number that all of them share, so that scales cost a quarter of a bit per weight instead of one bit.  Block types
without superblocks are plain affine grids.

Source: github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h.
"""

from collections.abc import Mapping
from dataclasses import dataclass

SUPERBLOCK = 256  # columns


@dataclass(frozen=True)
class BlockType:
    """A block type: its grid, and the size of a block in the file.

    bits       bits per code (quantized value)
    group      columns that share a scale
    symmetric  whether the zero point is fixed in the middle; if not, every sub-block has an offset
    columns    columns of a block; the length of a row is a multiple of it
    nbytes     bytes of a block
    fallback   the type to use where `columns` does not divide a row; it has more bits, never fewer
    """

    bits: int
    group: int
    symmetric: bool
    columns: int
    nbytes: int
    fallback: str | None = None

    @property
    def two_level(self) -> bool:
        """Whether its numbers are those of `Superblocks`; Q4_1 is a superblock of one sub-block, with sc = m = 1."""
        return self.columns == SUPERBLOCK or not self.symmetric


BLOCK_TYPES: Mapping[str, BlockType] = {
    "q4_k": BlockType(4, 32, False, SUPERBLOCK, 144, "q5_0"),
    "q5_k": BlockType(5, 32, False, SUPERBLOCK, 176, "q8_0"),
    "q6_k": BlockType(6, 16, True, SUPERBLOCK, 210, "q8_0"),
    "q4_0": BlockType(4, 32, True, 32, 18),
    "q4_1": BlockType(4, 32, False, 32, 20),
    "q5_0": BlockType(5, 32, True, 32, 22),
    "q8_0": BlockType(8, 32, True, 32, 34),
}


@dataclass(frozen=True)
class Recipe:
    """Block types by the role of a weight (`gguf/recipes.py`).

    usual     most weights
    generous  weights that get more bits by the rule of the recipe
    fused     q, k and v stored as one weight
    head      the lm_head, and an embedding that is also the lm_head
    """

    usual: str
    generous: str
    fused: str
    head: str


RECIPES: Mapping[str, Recipe] = {
    "gguf:q4_0": Recipe("q4_0", "q4_0", "q4_0", "q6_k"),
    "gguf:q4_1": Recipe("q4_1", "q4_1", "q4_1", "q6_k"),
    "gguf:q4_k": Recipe("q4_k", "q4_k", "q4_k", "q6_k"),
    "gguf:q5_k": Recipe("q5_k", "q5_k", "q5_k", "q6_k"),
    "gguf:q6_k": Recipe("q6_k", "q6_k", "q6_k", "q6_k"),
    "gguf:q4_k_m": Recipe("q4_k", "q6_k", "q5_k", "q6_k"),
    "gguf:q5_k_m": Recipe("q5_k", "q6_k", "q6_k", "q6_k"),
}

GGUF = "gguf"
"""The format of .gguf files that hold the quantized values of the other formats."""

GGUF_GRIDS = tuple(RECIPES)
"""Formats of .gguf files whose grids no other format can hold."""
