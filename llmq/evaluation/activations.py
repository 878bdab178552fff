"""Which inputs of linear layers ("activations") are quantized while a model is evaluated.

    file      as the checkpoint declares: its figures are those of an engine that runs it
    none      all inputs in float
    int8      those of the quantized layers (of a float model: all layers in the blocks), dynamically per token
    fp8       the same, as floats of eight bits

They are quantized in float before the linear layers (`numerics/fake_quantize.py`). The inputs of the head and the
embedding are float.
"""

from collections.abc import Mapping

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, listed
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.scheme import InputScheme
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings

AS_DECLARED, FLOAT_INPUTS = "file", "none"
ACTIVATIONS: Mapping[str, InputScheme | None] = {
    AS_DECLARED: None,
    FLOAT_INPUTS: None,
    "int8": InputScheme("int8", "dynamic"),
    "fp8": InputScheme("fp8", "dynamic"),
}


def require_known(name: str) -> None:
    """Raise ConfigError for a value of `--activations` that does not exist."""
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activations is {name!r}, expected one of {listed(ACTIVATIONS)}",
            hint="file, the default, computes what the checkpoint declares",
        )


def not_applied(checkpoint: Checkpoint, activations: str) -> str | None:
    """A note for a checkpoint that declares more than its weights as quantized, and is not evaluated like this."""
    if activations != AS_DECLARED or quantization_settings(checkpoint) is None:
        return None
    return "; ".join(PackedWeights(checkpoint).not_applied()) or None


def quantize_inputs(skeleton: Skeleton, activations: str) -> None:
    """Quantize the inputs of the linear layers in the blocks; `file` leaves them as the model was opened."""
    scheme = ACTIVATIONS[activations]
    if scheme is not None:
        paths = [path for block in skeleton.blocks for path in block.linears]
        quantized = [path for path in paths if skeleton.weights.is_quantized(f"{path}.weight")]
        skeleton.quantize_inputs(dict.fromkeys(quantized or paths, scheme))
    elif activations != AS_DECLARED:
        skeleton.quantize_inputs({})


def in_words(skeleton: Skeleton) -> str:
    """How the inputs of a model are quantized, for results: `none`, or `int8 dynamic per token`."""
    schemes = [block.inputs.schemes.get(path) for block in skeleton.blocks for path in block.linears]
    kinds = dict.fromkeys(str(scheme) for scheme in schemes if scheme is not None)
    if not kinds:
        return "none"
    number = sum(scheme is not None for scheme in schemes)
    return f"{' and '.join(kinds)}" + ("" if number == len(schemes) else f", in {number} of {len(schemes)} layers")
