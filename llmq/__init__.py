"""llmq: 4-bit language models from Hugging Face checkpoints.

    print(llmq.plan("model"))                                     # size, time and memory, before
    report = llmq.quantize("model", "out", method="gptq", calibration=["a text", "another text"])
    print(llmq.evaluate("out", against="model", text="held-out.txt"))
    print(llmq.verify("out"))                                     # is it complete, and which engines load it
    model, tokenizer = llmq.load("out")

Results print themselves, and show as tables in notebooks. The names below are loaded when they are first used:
`import llmq` imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmq._version import __version__

if TYPE_CHECKING:
    from llmq._quantize import quantize
    from llmq.config import QuantConfig
    from llmq.errors import LlmqError
    from llmq.evaluation.evaluate import evaluate
    from llmq.evaluation.results import Measurement
    from llmq.export.any_format import convert
    from llmq.export.conversion import Conversion
    from llmq.export.dequantize import dequantize
    from llmq.forecast.plan import plan
    from llmq.forecast.sizes_and_costs import Forecast
    from llmq.numerics.quantized_tensor import QuantizedTensor
    from llmq.numerics.scheme import InputScheme, Scheme, WeightScheme
    from llmq.report.record import Report
    from llmq.runtime.load import load
    from llmq.runtime.transformers.quantizer import disable_transformers, enable_transformers
    from llmq.training.convert import convert_qat
    from llmq.training.prepare import prepare_qat
    from llmq.verification.inspection import Inspection, inspect
    from llmq.verification.verified import Verification, verify

_HOMES = {
    "Conversion": "llmq.export.conversion",
    "Forecast": "llmq.forecast.sizes_and_costs",
    "InputScheme": "llmq.numerics.scheme",
    "Inspection": "llmq.verification.inspection",
    "LlmqError": "llmq.errors",
    "Measurement": "llmq.evaluation.results",
    "QuantConfig": "llmq.config",
    "QuantizedTensor": "llmq.numerics.quantized_tensor",
    "Report": "llmq.report.record",
    "Scheme": "llmq.numerics.scheme",
    "Verification": "llmq.verification.verified",
    "WeightScheme": "llmq.numerics.scheme",
    "convert": "llmq.export.any_format",
    "convert_qat": "llmq.training.convert",
    "dequantize": "llmq.export.dequantize",
    "disable_transformers": "llmq.runtime.transformers.quantizer",
    "enable_transformers": "llmq.runtime.transformers.quantizer",
    "evaluate": "llmq.evaluation.evaluate",
    "inspect": "llmq.verification.inspection",
    "load": "llmq.runtime.load",
    "plan": "llmq.forecast.plan",
    "prepare_qat": "llmq.training.prepare",
    "quantize": "llmq._quantize",
    "verify": "llmq.verification.verified",
}

__all__ = [
    "Conversion",
    "Forecast",
    "InputScheme",
    "Inspection",
    "LlmqError",
    "Measurement",
    "QuantConfig",
    "QuantizedTensor",
    "Report",
    "Scheme",
    "Verification",
    "WeightScheme",
    "__version__",
    "convert",
    "convert_qat",
    "dequantize",
    "disable_transformers",
    "enable_transformers",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "prepare_qat",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
