"""Evaluate a model with quantized activations (the inputs of linear layers), such as W8A8 instead of W8A16.

Quantization is simulated in float before the linear layers of the blocks (`numerics/fake_quantize.py`): the layers that
are quantized in the file, or all layers if none is. The inputs of the head and the embedding are kept in float.
"""

from collections.abc import Mapping

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, listed
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.scheme import InputScheme
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings

ACTIVATIONS: Mapping[str, InputScheme | None] = {"none": None, "int8": InputScheme("int8", "dynamic")}


def input_scheme(name: str) -> InputScheme | None:
    """The input scheme of `--activations`; raises ConfigError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activations is {name!r}, expected one of {listed(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def not_applied(checkpoint: Checkpoint, scheme: InputScheme | None) -> str | None:
    """A note for a checkpoint that declares quantized activations but is evaluated with float inputs, else None."""
    if scheme is not None or quantization_settings(checkpoint) is None:
        return None
    return "; ".join(PackedWeights(checkpoint).not_applied()) or None


def quantize_inputs(skeleton: Skeleton, scheme: InputScheme | None) -> None:
    """Quantize the inputs of the quantized linear layers in the blocks; in a float model, of all linear layers."""
    if scheme is None:
        return
    paths = [path for block in skeleton.blocks for path in block.linears]
    quantized = [path for path in paths if skeleton.weights.is_quantized(f"{path}.weight")]
    skeleton.quantize_inputs(dict.fromkeys(quantized or paths, scheme))
