"""Where a Hugging Face tensor stands in a GGUF file.

The names are the package `gguf`'s: its TensorNameMap knows what an architecture calls each tensor, and on disk nothing
else is needed.  Two things are not names: the experts of a layer are one tensor there, stacked, and some architectures
turn q and k's heads another way.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.errors import UnsupportedModelError

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
ROUTER = ".ffn_gate_inp."


@dataclass(frozen=True)
class Place:
    """A tensor's name in the file, and which of the stacked experts it is, if it is one."""

    name: str
    expert: int | None = None


class Names:
    """The names of one model; `arch` is GGUF's name of the architecture."""

    def __init__(self, arch: str, blocks: int) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in kinds:
            raise UnsupportedModelError(
                f"the package gguf knows no architecture {arch!r}", hint="a newer one may: pip install -U gguf"
            )
        self._map = gguf.get_tensor_name_map(kinds[arch], blocks)

    def place(self, name: str) -> Place | None:
        """Where `model.layers.0.self_attn.q_proj.weight` goes; None where the architecture has no such tensor."""
        found = _EXPERT.search(name)
        merged = name if found is None else _EXPERT.sub(".experts.", name, count=1)
        place = self._map.get_name(merged, try_suffixes=_SUFFIXES)
        if place is None:
            return None
        return Place(place, None if found is None else int(found.group(1)))

    def expert_modules(self, name: str, experts: int) -> list[str]:
        """What a checkpoint may call the modules that `blk.0.ffn_up_exps.weight` is a stack of, one for each expert."""
        wanted = name.removesuffix(".weight")
        known = (alias for alias, (_, place) in self._map.mapping.items() if place == wanted and ".experts." in alias)
        return [alias.replace(".experts.", f".experts.{e}.") for alias in known for e in range(experts)]


def interleave_halves(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows (N, …) of q or k as `transformers` rotates them -> as llama.cpp's "NORM" rotation wants them.

    transformers rotates row i of a head with row i + D/2, llama.cpp rows 2 i and 2 i + 1.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def separate_halves(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """The inverse of `interleave_halves`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
