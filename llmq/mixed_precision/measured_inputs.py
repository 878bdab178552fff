"""How the inputs of the layers of a unit are quantized while their sensitivity is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from llmq.algorithms.ranges import calibrated_scale
from llmq.model.analyse.input_groups import InputGroup
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import InputScheme


def schemes_of(
    unit: Mapping[InputGroup, InputStats], paths: Sequence[str], inputs: InputScheme
) -> dict[str, InputScheme]:
    """How the inputs of the layers in `paths` are quantized, with static scales for what their statistics have seen."""
    schemes: dict[str, InputScheme] = {}
    for group, stats in unit.items():
        scheme = inputs
        if stats.histogram is not None:
            scheme = replace(inputs, scale=calibrated_scale(inputs, stats.histogram, torch.float32))
        schemes |= {path: scheme for path in group.names if path in paths}
    return schemes
