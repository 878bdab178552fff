"""The place of a Hugging Face tensor in a GGUF file.

The names come from the package `gguf`: its TensorNameMap lists the names of an architecture.  There are three more
differences: in GGUF the experts of a layer are stacked in one tensor, some architectures have another order of the
rows of q and k, and llama.cpp's code for an architecture reads the biases of a few weights only.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.errors import UnsupportedModelError
from llmq.gguf.architectures import Architecture

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_IN_BLOCK = re.compile(r"^blk\.\d+\.")
_SUFFIXES = (".weight", ".bias")
ROUTER = ".ffn_gate_inp."


@dataclass(frozen=True)
class Place:
    """The name of a tensor in the file, and its number if it is one of several stacked experts."""

    name: str
    expert: int | None = None


class Names:
    """The names of one model with this architecture and number of blocks."""

    def __init__(self, arch: Architecture, blocks: int) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch.name not in kinds:
            raise UnsupportedModelError(
                f"the package gguf does not know the architecture {arch.name!r}",
                hint="try a newer version: pip install -U gguf",
            )
        self._map = gguf.get_tensor_name_map(kinds[arch.name], blocks)
        self._biases = frozenset(f"{weight}.bias" for weight in arch.biases)

    def place(self, name: str) -> Place | None:
        """Where `model.layers.0.self_attn.q_proj.weight` goes; None where the architecture has no such tensor."""
        number = _EXPERT.search(name)
        merged = name if number is None else _EXPERT.sub(".experts.", name, count=1)
        place = self._map.get_name(merged, try_suffixes=_SUFFIXES)
        if place is None or (place.endswith(".bias") and _IN_BLOCK.sub("", place) not in self._biases):
            return None
        return Place(place, None if number is None else int(number.group(1)))

    def expert_modules(self, name: str, experts: int) -> list[str]:
        """All names that checkpoints use for the experts stacked in `blk.0.ffn_up_exps.weight`."""
        wanted = name.removesuffix(".weight")
        known = (alias for alias, (_, place) in self._map.mapping.items() if place == wanted and ".experts." in alias)
        return [alias.replace(".experts.", f".experts.{e}.") for alias in known for e in range(experts)]


def interleave_halves(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows (N, …) of q or k in the order of `transformers` -> in the order of llama.cpp's "NORM" rotation.

    transformers rotates row i of a head with row i + D/2, llama.cpp rows 2 i and 2 i + 1.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def separate_halves(rows: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """The inverse of `interleave_halves`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
