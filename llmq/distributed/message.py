"""Messages between the processes of a run: plain values as JSON text, with the bytes of their tensors apart.

Both ends run the same code, but a message is data all the same: only values that llmq exchanges are read, and the only
classes that a message can name are dataclasses of llmq.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes; tensors in a message start at multiples of it
COLLECTIONS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "list": list,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}


class Message:
    """A value: its JSON text, the bytes of its CPU tensors, and the bytes of its GPU tensors.

    So tensors on a GPU are sent from GPU to GPU.
    """

    def __init__(self, text: bytes, data: tuple[Tensor, Tensor]) -> None:
        self.text = text
        self.data = data

    @property
    def nbytes(self) -> list[int]:
        return [len(part) for part in self.data]

    @classmethod
    def of(cls, value: Any) -> "Message":
        """Raises TypeError for a value of a type that is not exchanged."""
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        ends = [0, 0]

        def place(tensor: Tensor) -> list[Any]:
            where = int(tensor.device.type != "cpu")
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            start = ends[where]
            padding = flat.new_zeros(-len(flat) % ALIGNED)
            parts[where].extend((flat, padding))
            ends[where] += len(flat) + len(padding)
            return [where, start, _name(tensor.dtype), list(tensor.shape)]

        text = json.dumps(_encoded(value, place)).encode()
        empty = torch.empty(0, dtype=torch.uint8)
        return cls(text, (torch.cat(parts[0] or [empty]), torch.cat(parts[1] or [empty])))

    def value(self) -> Any:
        """The value. Raises ValueError for a text that `of` does not write."""

        def tensor(where: int, start: int, dtype: str, shape: list[int]) -> Tensor:
            kind = _dtype(dtype)
            count = torch.Size(shape).numel() * kind.itemsize
            return self.data[where][start : start + count].view(kind).reshape(shape)

        return _decoded(json.loads(self.text), tensor)


def _encoded(value: Any, place: Callable[[Tensor], list[Any]]) -> Any:
    """Numbers, texts and None as they are; everything else as [kind, …]."""

    def encoded(part: Any) -> Any:
        return _encoded(part, place)

    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return ["tensor", *place(value)]
    if isinstance(value, torch.dtype):
        return ["dtype", _name(value)]
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if isinstance(value, dict):
        return ["dict", [[encoded(key), encoded(part)] for key, part in value.items()]]
    for kind, collection in COLLECTIONS.items():
        if type(value) is collection:
            return [kind, [encoded(part) for part in value]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith("llmq."):
        fields = {field.name: encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return ["class", type(value).__module__, type(value).__qualname__, fields]
    raise TypeError(f"{type(value)} cannot be sent to other processes")


def _decoded(value: Any, tensor: Callable[..., Tensor]) -> Any:
    """The inverse of `_encoded`."""
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "tensor":
        return tensor(*rest)
    if kind == "dtype":
        return _dtype(rest[0])
    if kind == "path":
        return Path(rest[0])
    if kind == "range":
        return range(*rest)
    if kind == "dict":
        return {_decoded(key, tensor): _decoded(part, tensor) for key, part in rest[0]}
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](_decoded(part, tensor) for part in rest[0])
    if kind == "class":
        module, name, fields = rest
        made = _class(module, name)
        instance: Any = object.__new__(made)
        for field, part in fields.items():
            object.__setattr__(instance, field, _decoded(part, tensor))
        return instance
    raise ValueError(f"a message has a value of the unknown kind {kind!r}")


def _class(module: str, name: str) -> type:
    if not module.startswith("llmq."):
        raise ValueError(f"a message names the class {name} of {module}, which is not part of llmq")
    made = getattr(importlib.import_module(module), name, None)
    if not isinstance(made, type) or not dataclasses.is_dataclass(made):
        raise ValueError(f"a message names {module}.{name}, which is not a dataclass")
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a message names the dtype {name}, which torch does not have")
    return dtype
