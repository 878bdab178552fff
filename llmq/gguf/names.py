"""The place of a Hugging Face tensor in a GGUF file.

The names come from the package `gguf`: its TensorNameMap lists the names of an architecture.  There are four more
differences: in GGUF the experts of a layer are stacked in one tensor, some architectures have another order of the
rows of a tensor or divide it (`changes.py`), llama.cpp's code for an architecture reads the biases of a few weights
only, and a file holds the language model only, without image encoder and without heads for multi-token prediction.
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.errors import UnsupportedModelError
from llmq.gguf.architecture import Architecture
from llmq.gguf.changes import Order, Value

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_IN_BLOCK = re.compile(r"^blk\.\d+\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_LANGUAGE = re.compile(r"^(model\.)?language_model\.(model\.)?")
_OTHER_PARTS = re.compile(
    r"^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector|audio_tower|embed_vision|embed_audio|mtp)\."
)
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model, or some of its rows, are in the file.

    name    of the tensor in the file
    expert  its number if it is one of several stacked experts
    rows    which rows of the model's tensor are there; None for all, in their order
    """

    name: str
    expert: int | None = None
    rows: Order | None = None


class Names:
    """The names of one model with this architecture and configuration."""

    def __init__(self, arch: Architecture, config: Mapping[str, Any]) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch.name not in kinds:
            raise UnsupportedModelError(
                f"the package gguf does not know the architecture {arch.name!r}",
                hint="try a newer version: pip install -U gguf",
            )
        self._arch, self._config = arch, config
        layers = config["num_hidden_layers"]
        self._map = gguf.get_tensor_name_map(kinds[arch.name], layers)
        for own, place in arch.named.items():
            names = {f"model.layers.{i}.{own}": (None, f"blk.{i}.{place}") for i in range(layers)}
            self._map.mapping.update(names)

    def place(self, name: str) -> Place | None:
        """The first of `places`; None where there is none."""
        return next(iter(self.places(name)), None)

    def places(self, name: str) -> tuple[Place, ...]:
        """Where `model.layers.0.self_attn.q_proj.weight` goes; none where the architecture has no such tensor."""
        name = _LANGUAGE.sub("model.", name)
        for own, usual in self._arch.renamed.items():
            name = name.replace(own, usual)
        number = _EXPERT.search(name)
        merged = name if number is None else _EXPERT.sub(".experts.", name, count=1)
        place = self._map.get_name(merged, try_suffixes=_SUFFIXES)
        if place is None:
            return ()
        block = _IN_BLOCK.match(place)
        inside = place[block.end() if block else 0 :]
        suffix = next((ending for ending in _SUFFIXES if inside.endswith(ending)), "")
        inside = inside.removesuffix(suffix)
        if block and suffix == ".bias" and inside not in self._arch.biases:
            return ()
        expert = None if number is None else int(number.group(1))
        if block is None or (rows := self._arch.rows.get(inside)) is None:
            return (Place(place, expert),)
        orders = rows(self._config)
        return tuple(Place(f"{block[0]}{part}{suffix}", expert, order) for part, order in orders.items())

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor is not part of the language model, or one that llama.cpp computes itself."""
        patterns = ("*.rotary_emb.inv_freq", *self._arch.without)
        layer = _LAYER.match(_LANGUAGE.sub("model.", name))
        if layer is not None and int(layer[1]) >= self._config["num_hidden_layers"]:
            return True
        return bool(_OTHER_PARTS.match(name)) or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    def columns(self, place: str) -> Order | None:
        """The order of the columns of a weight, by its name in the file; None for that of the model."""
        order = self._arch.columns.get(_IN_BLOCK.sub("", place).removesuffix(".weight"))
        return None if order is None else order(self._config)

    def value(self, place: str) -> Value | None:
        """How the values of a float tensor differ; by its name in the file."""
        inside = _IN_BLOCK.sub("", place)
        patterns = self._arch.values.items()
        return next((value for pattern, value in patterns if fnmatch.fnmatch(inside, pattern)), None)

    def expert_modules(self, name: str, experts: int) -> list[str]:
        """All names that checkpoints use for the experts stacked in `blk.0.ffn_up_exps.weight`."""
        wanted = name.removesuffix(".weight")
        known = [alias for alias, (_, place) in self._map.mapping.items() if place == wanted and ".experts." in alias]
        for own, usual in self._arch.renamed.items():
            known += [f"{alias}.".replace(usual, own)[:-1] for alias in known if f"{alias}.".endswith(usual)]
        places = {alias: self.place(f"{alias.replace('.experts.', '.experts.0.')}.weight") for alias in known}
        own_names = [alias for alias, place in places.items() if place is not None and place.name == name]
        return [alias.replace(".experts.", f".experts.{e}.") for alias in own_names for e in range(experts)]
