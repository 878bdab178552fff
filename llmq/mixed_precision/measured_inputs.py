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
    measured = [calibrated_scale(inputs, s.histogram, torch.float32) for s in unit.values() if s.histogram is not None]
    for group, stats in unit.items():
        scheme = inputs
        if stats.histogram is not None:
            own = calibrated_scale(inputs, stats.histogram, torch.float32)
            scheme = replace(inputs, scale=min(measured) if inputs.scales == "local" else own)  # experts share it
        schemes |= {path: scheme for path in group.names if path in paths}
    return schemes
