"""Remedies that depend on the model: a command is suggested only if it would work."""

from llmq.errors import UnsupportedModelError
from llmq.gguf.supported import architecture, language_config
from llmq.steps import output_layout
from llmq.verification.engines.checkpoint_facts import Subject

CONVERT = "llmq convert PATH OUT --to"
QUANTIZE_AGAIN = "quantize the original model again"
SERVED_GROUPS = (32, 64, 128, "channel")  # supported for compressed-tensors, see the rules


def to_gguf(subject: Subject) -> str:
    """How to get a .gguf file: convert it, re-quantize it, or not with llmq."""
    try:
        architecture(language_config(subject.config))
    except UnsupportedModelError:
        return "llmq writes no .gguf file of this architecture; try llama.cpp's convert_hf_to_gguf.py on the original"
    if any(linear.inputs is not None for linear in subject.packed):
        return f"{QUANTIZE_AGAIN} with --format gguf: llama.cpp rounds inputs to 8 bits itself"
    if any(linear.ordered or linear.scheme is None for linear in subject.packed) or any(
        linear.scheme is not None and output_layout.gguf_refusal(linear.scheme, linear.in_features)
        for linear in subject.packed
    ):
        return f"{QUANTIZE_AGAIN} with --format gguf; {CONVERT} gguf --allow-requantize re-quantizes this model"
    return f"{CONVERT} gguf is lossless" if subject.packed else f"{QUANTIZE_AGAIN} with --format gguf"


def another_grid(subject: Subject) -> str:
    """How to get a supported grid, for a gptq model with an unsupported one."""
    schemes = {linear.scheme for linear in subject.packed if linear.scheme is not None}
    if any(not scheme.symmetric and scheme.bits not in (4, 8) for scheme in schemes):
        return f"{QUANTIZE_AGAIN} with --symmetric"  # other formats do not support such zero points either
    if any(scheme.group_size not in SERVED_GROUPS for scheme in schemes):
        return f"{QUANTIZE_AGAIN} with --symmetric, or in groups of 32, 64 or 128"
    if any(linear.ordered for linear in subject.packed):
        return f"{QUANTIZE_AGAIN}; {CONVERT} compressed-tensors --allow-requantize re-quantizes this model"
    awq = len(schemes) == 1 and all(scheme.bits == 4 for scheme in schemes)
    return f"{CONVERT} compressed-tensors{', or --to awq' if awq else ''}"
