"""What to do about it, where that depends on the model: a command is named only where it would work."""

from llmq.errors import UnsupportedModelError
from llmq.gguf.architectures import architecture
from llmq.steps import output_layout
from llmq.verify.engines.checkpoint_facts import Subject

CONVERT = "llmq convert PATH OUT --to"
ANEW = "quantize the original model again"
SERVED_GROUPS = (32, 64, 128, "channel")  # of compressed-tensors files, see the rules


def to_gguf(subject: Subject) -> str:
    """A .gguf file of it: with the same codes, with others, or none at all."""
    try:
        architecture(subject.config)
    except (UnsupportedModelError, KeyError):  # KeyError: its sizes are those of a part of it
        return "llmq writes no .gguf file of this architecture; llama.cpp's convert_hf_to_gguf.py may, of the original"
    if any(linear.ordered or linear.scheme is None for linear in subject.packed) or any(
        linear.scheme is not None and output_layout.gguf_refusal(linear.scheme, linear.in_features)
        for linear in subject.packed
    ):
        return f"{ANEW} with --format gguf; {CONVERT} gguf --allow-requantize rounds what is here anew"
    return f"{CONVERT} gguf keeps the codes" if subject.packed else f"{ANEW} with --format gguf"


def another_grid(subject: Subject) -> str:
    """Where gptq has a grid that engines do not read."""
    schemes = {linear.scheme for linear in subject.packed if linear.scheme is not None}
    if any(not scheme.symmetric and scheme.bits not in (4, 8) for scheme in schemes):
        return f"{ANEW} with --symmetric"  # no other format is read with such zeros either
    if any(scheme.group_size not in SERVED_GROUPS for scheme in schemes):
        return f"{ANEW} with --symmetric, or in groups of 32, 64 or 128"
    if any(linear.ordered for linear in subject.packed):
        return f"{ANEW}; {CONVERT} compressed-tensors --allow-requantize rounds what is here anew"
    awq = len(schemes) == 1 and all(scheme.bits == 4 for scheme in schemes)
    return f"{CONVERT} compressed-tensors{', or --to awq' if awq else ''}"
