"""Trace a quantized model with transformers' exporter, which knows every architecture and its cache.

The model is built in float32 with the values of the quantized weights. The exported graph takes any number of tokens
after any number of cached ones, so one graph reads a prompt and continues it.
"""

import importlib.util
from typing import Any

import torch

from llmq.errors import BackendError, LlmqError, UnsupportedModelError
from llmq.export.float_names import model_with, quietly
from llmq.export.quantized_source import QuantizedSource

PACKAGES = ("onnx", "onnxscript", "onnx_ir")
INSTALL = "pip install 'llmq-quantize[onnx]'"
BATCH, LENGTH = 2, 7  # of the tokens with which the model is traced; every size becomes variable
PART = "decode"  # the exporter's name of the graph that continues a text, here also an empty one
FLOAT_HINT = "llmq convert --to float writes floats for other exporters; --to gguf runs on CPUs, too"


def require_exporter() -> None:
    """Raise BackendError if a package is missing, or transformers has no exporters."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"--to onnx needs the package {missing[0]}, which is not installed", hint=INSTALL)
    if importlib.util.find_spec("transformers.exporters") is None:
        import transformers

        message = f"--to onnx needs transformers 5.24 or later, found {transformers.__version__}"
        raise BackendError(message, hint="pip install -U transformers")


def float_model(source: QuantizedSource, *, remote_code: bool) -> Any:
    """The model of a checkpoint in float32, with the values of its quantized weights; all of it is in memory."""
    packed, names = source.packed, source.other_names()
    tensors = {name: source.checkpoint.tensor(name).to(torch.float32) for name in names}
    tensors |= {packed.weight_name(module): packed.weight(module) for module in packed.modules}
    return model_with(source, tensors, remote_code=remote_code)


def export(model: Any, quantizer: Any) -> Any:
    """The exported model of transformers with one graph, which `quantizer` has changed.

    Raises UnsupportedModelError if the model cannot be traced, or needs several graphs.
    """
    from transformers import GenerationConfig
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % (model.config.get_text_config().vocab_size - 1) + 1
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = None  # the traced text must not end early
    try:
        with quietly():
            parts = decompose_for_generation(model, inputs, generation_config=settings, multi_token_decode=True)
            if PART not in parts:
                raise UnsupportedModelError(f"{_name(model)} has no graph that continues a text", hint=FLOAT_HINT)
            part, traced = parts[PART]
            return OnnxExporter().export(part, traced, OnnxConfig(dynamic=True, ort_fusions="cpu", quantizer=quantizer))
    except LlmqError:
        raise
    except Exception as error:  # the exporters of torch and transformers raise many types of errors
        raise UnsupportedModelError(
            f"transformers cannot export {_name(model)} to ONNX: {_first_line(error)}", hint=FLOAT_HINT
        ) from error


def _name(model: Any) -> str:
    return type(model).__name__


def _first_line(error: BaseException) -> str:
    """The first line of the innermost error, which names the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
