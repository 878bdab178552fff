"""Fixtures that several tests of kernels use to record memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Inside `with`, records the bytes of the largest tensor that any torch operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()  # type: ignore[no-untyped-call]
