"""llmq: 4-bit language models from Hugging Face checkpoints.

    report = llmq.quantize("model", "out", method="gptq", calibration="text.txt")
    model, tokenizer = llmq.load("out")

The names below are loaded when they are first used; importing llmq imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmq._version import __version__

if TYPE_CHECKING:
    from llmq.config import QuantConfig, Scheme
    from llmq.dequantized import dequantize
    from llmq.errors import LlmqError
    from llmq.job import quantize
    from llmq.quantized import QuantizedTensor
    from llmq.report.record import Report
    from llmq.runtime.hf import disable_transformers, enable_transformers
    from llmq.runtime.load import load

_HOMES = {
    "LlmqError": "llmq.errors",
    "QuantConfig": "llmq.config",
    "QuantizedTensor": "llmq.quantized",
    "Report": "llmq.report.record",
    "Scheme": "llmq.config",
    "dequantize": "llmq.dequantized",
    "disable_transformers": "llmq.runtime.hf",
    "enable_transformers": "llmq.runtime.hf",
    "load": "llmq.runtime.load",
    "quantize": "llmq.job",
}

__all__ = [
    "LlmqError",
    "QuantConfig",
    "QuantizedTensor",
    "Report",
    "Scheme",
    "__version__",
    "dequantize",
    "disable_transformers",
    "enable_transformers",
    "load",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
