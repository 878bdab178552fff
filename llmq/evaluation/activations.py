"""Evaluate a model as one whose inputs ("activations") are quantized, too: W8A8 and not W8A16.

The rounding is simulated in float, in front of the linear layers of the blocks (`numerics/fake_quantize.py`): of those
that the file holds quantized, or of all where the file holds none.  The head and the embedding are left in float.
"""

from collections.abc import Mapping

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, listed
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.scheme import InputScheme
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings

ACTIVATIONS: Mapping[str, InputScheme | None] = {"none": None, "int8": InputScheme("int8", "dynamic")}


def input_scheme(name: str) -> InputScheme | None:
    """The input scheme that `--activations` names; raises ConfigError for a name that is none."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activations is {name!r}, expected one of {listed(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def not_applied(checkpoint: Checkpoint, scheme: InputScheme | None) -> str | None:
    """What to say of a checkpoint that declares quantized activations, but is evaluated with float inputs."""
    if scheme is not None or quantization_settings(checkpoint) is None:
        return None
    return "; ".join(PackedWeights(checkpoint).not_applied()) or None


def quantize_inputs(skeleton: Skeleton, scheme: InputScheme | None) -> None:
    """Round the inputs of the quantized linear layers in the blocks; of all of them in a float model."""
    if scheme is None:
        return
    paths = [path for block in skeleton.blocks for path in block.linears]
    quantized = [path for path in paths if skeleton.weights.is_quantized(f"{path}.weight")]
    skeleton.quantize_inputs(dict.fromkeys(quantized or paths, scheme))
