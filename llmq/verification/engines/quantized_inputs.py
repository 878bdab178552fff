"""The checks for layers whose inputs are quantized, too: which engines have a kernel for such a product.

The inputs are in int8 with weights in 8 bits (W8A8) or fewer (W4A8), or in fp8 with weights in fp8 or 4 bits.
`rules.py` has the sources.
"""

from collections.abc import Callable

from llmq.numerics.scheme import InputScheme, WeightScheme
from llmq.verification.engines.checkpoint_facts import Linear, Subject
from llmq.verification.engines.conditions import Problems, groups, is_ct, layers

BYTES = 8  # bits of weights for which engines multiply integers of one byte

Problem = Callable[[WeightScheme, InputScheme], str | None]


def _of_layers(problem: Problem, *dtypes: str) -> Callable[[Subject], Problems]:
    """Find layers with quantized inputs of these dtypes for which `problem` has a text."""

    def ask(linear: Linear) -> str | None:
        if linear.scheme is None or linear.inputs is None or linear.inputs.dtype not in dtypes:
            return None
        return problem(linear.scheme, linear.inputs)

    return lambda subject: layers(subject, ask) if is_ct(subject) else ()


def _grouped(weights: WeightScheme, _: InputScheme) -> str | None:
    if weights.bits != BYTES or not isinstance(weights.group_size, int):
        return None
    return f"its inputs are in int8 and its weights have groups of {weights.group_size}"


def _fewer_bits(weights: WeightScheme, inputs: InputScheme) -> str | None:
    return f"its inputs are in {inputs.dtype} and its weights in {weights.bits} bits" if weights.bits < BYTES else None


def in_bytes(subject: Subject) -> bool:
    """Whether the weights are stored with one byte per code, in all groups with quantized inputs."""
    own = [group for group in groups(subject).values() if group.get("input_activations")]
    return bool(own) and all(group.get("format", subject.settings.get("format")) == "int-quantized" for group in own)


def _static_fewer_bits(weights: WeightScheme, inputs: InputScheme) -> str | None:
    static = weights.bits < BYTES and inputs.scales == "static"
    return f"its inputs have a static scale and its weights {weights.bits} bits" if static else None


def _bytes(weights: WeightScheme, inputs: InputScheme) -> str | None:
    return f"its inputs and weights are in {inputs.dtype}" if weights.bits == BYTES else None


def _other_groups(weights: WeightScheme, _: InputScheme) -> str | None:
    if weights.bits == BYTES or weights.group_size == 128:
        return None
    return f"its inputs are in fp8 and its weights {weights}"


grouped, fewer_bits, bytes_ = (_of_layers(problem, "int8") for problem in (_grouped, _fewer_bits, _bytes))
floats, four_bits, other_groups = (_of_layers(problem, "fp8") for problem in (_bytes, _fewer_bits, _other_groups))
static_fewer_bits = _of_layers(_static_fewer_bits, "int8", "fp8")
quantized = _of_layers(lambda _, inputs: f"its inputs are in {inputs.dtype}", "int8", "fp8", "nvfp4")
nvfp4 = _of_layers(lambda *_: "its inputs are in nvfp4", "nvfp4")


def words(subject: Subject) -> Problems:
    """Weights of fewer bits in packed words."""
    return () if in_bytes(subject) else fewer_bits(subject)


def few_bits_in_bytes(subject: Subject) -> Problems:
    """Weights of fewer bits with one byte per code."""
    return fewer_bits(subject) if in_bytes(subject) else ()
