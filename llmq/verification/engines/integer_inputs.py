"""The checks for layers whose inputs are quantized, too: which engines have a kernel for such a product.

The weights are in 8 bits (W8A8) or fewer (W4A8), the inputs in int8. `rules.py` has the sources.
"""

from collections.abc import Callable

from llmq.verification.engines.checkpoint_facts import Linear, Subject
from llmq.verification.engines.conditions import Problems, groups, is_ct, layers

BYTES = 8  # bits of weights for which engines multiply integers of one byte


def _of_layers(problem: Callable[[Linear, int], str | None]) -> Callable[[Subject], Problems]:
    def ask(linear: Linear) -> str | None:
        scheme = linear.scheme
        return None if scheme is None or linear.inputs is None else problem(linear, scheme.bits)

    return lambda subject: layers(subject, ask) if is_ct(subject) else ()


def _grouped(linear: Linear, bits: int) -> str | None:
    if bits != BYTES or linear.scheme is None or not isinstance(linear.scheme.group_size, int):
        return None
    return f"its inputs are in int8 and its weights have groups of {linear.scheme.group_size}"


def _fewer_bits(linear: Linear, bits: int) -> str | None:
    return f"its inputs are in int8 and its weights in {bits} bits" if bits < BYTES else None


def in_bytes(subject: Subject) -> bool:
    """Whether the weights are stored with one byte per code, in all groups with quantized inputs."""
    own = [group for group in groups(subject).values() if group.get("input_activations")]
    return bool(own) and all(group.get("format", subject.settings.get("format")) == "int-quantized" for group in own)


def _static_fewer_bits(linear: Linear, bits: int) -> str | None:
    static = linear.inputs is not None and linear.inputs.scales == "static"
    return f"its inputs have a static scale and its weights {bits} bits" if bits < BYTES and static else None


def _bytes(linear: Linear, bits: int) -> str | None:
    return "its inputs and weights are in int8" if bits == BYTES else None


grouped, fewer_bits, bytes_ = _of_layers(_grouped), _of_layers(_fewer_bits), _of_layers(_bytes)


def words(subject: Subject) -> Problems:
    """Weights of fewer bits in packed words."""
    return () if in_bytes(subject) else fewer_bits(subject)


def few_bits_in_bytes(subject: Subject) -> Problems:
    """Weights of fewer bits with one byte per code."""
    return fewer_bits(subject) if in_bytes(subject) else ()


static_fewer_bits = _of_layers(_static_fewer_bits)
quantized = _of_layers(lambda linear, bits: "its inputs are in int8")
