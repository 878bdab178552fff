"""The block types of GGUF that llmq quantizes to, and the recipes that choose among them.

A block type fixes the grid completely.

A *superblock* has 256 columns in sub-blocks.  The scales (and offsets) of the sub-blocks are small integers times an
fp16 number that all of them share, so that scales cost a quarter of a bit per weight instead of one bit.  Block types
without superblocks are plain affine grids.

Source: github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h.
"""

from collections.abc import Callable, Mapping
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
    largest    the largest small integer of a superblock: of sc and m, and in a symmetric grid, where sc has a sign, of
               sc only; the lowest sc is then -largest - 1
    fallback   the type to use where `columns` does not divide a row; it has more bits, never fewer
    table      the values that codes stand for (`llmq_kernels/value_tables.py`); None for integers
    """

    bits: int
    group: int
    symmetric: bool
    columns: int
    nbytes: int
    largest: int = 1
    fallback: str | None = None
    table: str | None = None

    @property
    def two_level(self) -> bool:
        """Whether its numbers are those of `Superblocks`; Q4_1 and IQ4_NL have one sub-block, with sc = m = 1."""
        return self.columns == SUPERBLOCK or not self.symmetric or self.table is not None


BLOCK_TYPES: Mapping[str, BlockType] = {
    "q2_k": BlockType(2, 16, False, SUPERBLOCK, 84, 15, "q4_0"),
    "q3_k": BlockType(3, 16, True, SUPERBLOCK, 110, 31, "q4_0"),
    "q4_k": BlockType(4, 32, False, SUPERBLOCK, 144, 63, "q5_0"),
    "q5_k": BlockType(5, 32, False, SUPERBLOCK, 176, 63, "q8_0"),
    "q6_k": BlockType(6, 16, True, SUPERBLOCK, 210, 127, "q8_0"),
    "q4_0": BlockType(4, 32, True, 32, 18),
    "q4_1": BlockType(4, 32, False, 32, 20),
    "q5_0": BlockType(5, 32, True, 32, 22),
    "q8_0": BlockType(8, 32, True, 32, 34),
    "iq4_xs": BlockType(4, 32, True, SUPERBLOCK, 136, 31, "iq4_nl", "iq4"),
    "iq4_nl": BlockType(4, 32, True, 32, 18, table="iq4"),
}

V, OUTPUT = ("attn_v", "attn_qkv", "attn_kv_b"), ("attn_output",)  # fused weights have the role of v
DOWN = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")


def everywhere(layer: int, layers: int) -> bool:
    """All layers."""
    return True


def spread(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third layer between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@dataclass(frozen=True)
class First:
    """The first `count` layers, or one in `share` of all layers."""

    count: int = 0
    share: int = 0

    def __call__(self, layer: int, layers: int) -> bool:
        return layer < (layers // self.share if self.share else self.count)


@dataclass(frozen=True)
class Rule:
    """A block type for some weights.

    kinds    their names in a layer of a GGUF file (`attn_v`)
    type     the block type
    where    which of the layers, from the place and their number; of the layers that have such a weight for those
             with the role of v
    grouped  whether the rule is only for models with four or more query heads per key head
    """

    kinds: tuple[str, ...]
    type: str
    where: Callable[[int, int], bool] = everywhere
    grouped: bool = False


@dataclass(frozen=True)
class Recipe:
    """Which weight gets which block type: that of the first rule that is for it (`gguf/recipes.py`).

    usual  most weights
    rules  the others
    head   the lm_head, and an embedding that is also the lm_head
    """

    usual: str
    rules: tuple[Rule, ...] = ()
    head: str = "q6_k"


RECIPES: Mapping[str, Recipe] = {
    "gguf:q4_0": Recipe("q4_0"),
    "gguf:q4_1": Recipe("q4_1"),
    "gguf:q8_0": Recipe("q8_0", head="q8_0"),
    "gguf:q2_k": Recipe("q2_k", (
        Rule(V, "q4_k", grouped=True), Rule(V + DOWN + OUTPUT, "q3_k"),
    )),
    "gguf:q3_k_s": Recipe("q3_k"),
    "gguf:q3_k_m": Recipe("q3_k", (
        Rule(V, "q5_k", First(2)), Rule(DOWN, "q5_k", First(share=16)), Rule(V + DOWN + OUTPUT, "q4_k"),
    )),
    "gguf:q3_k_l": Recipe("q3_k", (Rule(V + DOWN + OUTPUT, "q5_k"),)),
    "gguf:q4_k": Recipe("q4_k"),
    "gguf:q4_k_s": Recipe("q4_k", (Rule(V, "q5_k", First(4)), Rule(DOWN, "q5_k", First(share=8)))),
    "gguf:q4_k_m": Recipe("q4_k", (Rule(V + DOWN, "q6_k", spread),)),
    "gguf:q5_k": Recipe("q5_k"),
    "gguf:q5_k_m": Recipe("q5_k", (Rule(V + DOWN, "q6_k", spread),)),
    "gguf:q6_k": Recipe("q6_k"),
    "gguf:iq4_xs": Recipe("iq4_xs", (Rule(V, "q5_k", grouped=True),)),
    "gguf:iq4_nl": Recipe("iq4_nl", (Rule(V, "q5_k", grouped=True),)),
}  # fmt: skip

GGUF = "gguf"
"""The format of .gguf files that hold the quantized values of the other formats."""

GGUF_GRIDS = tuple(RECIPES)
"""Formats of .gguf files whose grids no other format can hold."""
