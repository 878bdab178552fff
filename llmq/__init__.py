"""llmq: 4-bit language models from Hugging Face checkpoints.

    report = llmq.quantize("model", "out", method="gptq", calibration="text.txt")
    model, tokenizer = llmq.load("out")

The names below are loaded when they are first used. `import llmq` imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmq._version import __version__

if TYPE_CHECKING:
    from llmq.config import QuantConfig
    from llmq.errors import LlmqError
    from llmq.export.dequantize import dequantize
    from llmq.job import quantize
    from llmq.numerics.quantized_tensor import QuantizedTensor
    from llmq.numerics.scheme import InputScheme, Scheme, WeightScheme
    from llmq.report.record import Report
    from llmq.runtime.load import load
    from llmq.runtime.transformers.quantizer import disable_transformers, enable_transformers

_HOMES = {
    "InputScheme": "llmq.numerics.scheme",
    "LlmqError": "llmq.errors",
    "QuantConfig": "llmq.config",
    "QuantizedTensor": "llmq.numerics.quantized_tensor",
    "Report": "llmq.report.record",
    "Scheme": "llmq.numerics.scheme",
    "WeightScheme": "llmq.numerics.scheme",
    "dequantize": "llmq.export.dequantize",
    "disable_transformers": "llmq.runtime.transformers.quantizer",
    "enable_transformers": "llmq.runtime.transformers.quantizer",
    "load": "llmq.runtime.load",
    "quantize": "llmq.job",
}

__all__ = [
    "InputScheme",
    "LlmqError",
    "QuantConfig",
    "QuantizedTensor",
    "Report",
    "Scheme",
    "WeightScheme",
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
