"""Count what operations do while they run: FLOP of products, bytes of all others. It works on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llmq.model.passes.replay import tensors_in

PRODUCTS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}  # torch does not list addmm_


@dataclass(frozen=True)
class Counted:
    """FLOP of matrix products, bytes read and written by other operations, and the number of operations."""

    flops: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(self.flops + other.flops, self.moved + other.moved, self.calls + other.calls)

    def __mul__(self, factor: float) -> "Counted":
        return Counted(self.flops * factor, self.moved * factor, self.calls * factor)


class Counter(TorchDispatchMode):
    """While entered, counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Counted()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        flops = moved = 0.0
        if func._overloadpacket in PRODUCTS:
            flops = float(PRODUCTS[func._overloadpacket](*args, **(kwargs or {}), out_val=output))
        elif not func.is_view:
            moved = float(sum(tensor.nbytes for tensor in tensors_in([*args, output])))
        self.counted += Counted(flops, moved, float(not func.is_view))
        return output
