"""Random arguments of the W4A16 ops are dictionaries by name: as NumPy arrays, and as `PackedWeight`s."""

from typing import Any

from torch import Tensor

from llmq_kernels.w4a16.packed_weight import PackedWeight


def in_numpy(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the reference; NumPy has no bfloat16, and float64 holds every float16, bfloat16 and float32."""

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        return value.double().numpy() if value.is_floating_point() else value.numpy()

    return {name: converted(value) for name, value in case.items()}


def weight_in(case: dict[str, Any]) -> PackedWeight[Any]:
    return PackedWeight(**{name: case[name] for name in PackedWeight._fields if name in case})


def grouped(case: dict[str, Any]) -> dict[str, Any]:
    """x, weight, bias and the other arguments of a case by name, as every version of the product takes them."""
    rest = {name: value for name, value in case.items() if name not in PackedWeight._fields}
    return {"bias": None, **rest, "weight": weight_in(case)}
