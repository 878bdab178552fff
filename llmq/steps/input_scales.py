"""Static and global scales of the inputs of layers: measured in a run, read from committed blocks, applied in all
later passes.

A scale is fitted to the inputs of the quantized model: the layers before, and their inputs, are quantized already. All
layers that share an input have the same scale. The experts of a layer have one global scale, which fits the largest
input of all of them: engines run them as one, and an expert alone sees few tokens.
"""

from collections.abc import Mapping

from torch import Tensor

from llmq.algorithms.ranges import calibrated_scale
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.numerics.affine_grid import dtype_of
from llmq.numerics.fake_quantize import global_scale
from llmq.numerics.input_stats import InputStats
from llmq.steps.run import Run


def measure(run: Run, block: Block, group: InputGroup, stats: InputStats | None) -> list[str]:
    """Choose the static scale of a group's input, if it has one, and quantize the input from now on.

    Returns notes for the user.
    """
    if stats is None or (stats.histogram is None and stats.largest_of_experts is None):
        return []
    dtype, waiting = dtype_of(run.options.scale_dtype), [path for path in group.names if block.inputs.awaits(path)]
    for path in waiting:
        plan = run.plans[path]
        assert plan.scheme.inputs is not None, "it waits for a scale"
        if stats.histogram is None:
            scale = global_scale(stats.largest_of_experts or 0.0)
        else:
            scale = calibrated_scale(plan.scheme.inputs, stats.histogram, dtype)
        run.plans[path] = plan.with_input_scale(scale)
    apply(run, block)
    largest = stats.largest_of_experts if stats.histogram is None else stats.histogram.limit
    return [
        f"{run.plans[path].name}: its inputs are 0 in all calibration tokens, so that their scale is 1, which "
        "is a guess; use other text, or activations=none in an override"
        for path in waiting
        if largest == 0
    ]


def restore(run: Run, block: Block, path: str, tensors: Mapping[str, Tensor]) -> None:
    """Take the static scale of a committed layer from the tensors of its block."""
    layout, plan = run.layout, run.plans[path]
    if plan.scheme.inputs is None or not plan.scheme.inputs.calibrated or layout.with_inputs is None:
        return
    own = {name.removeprefix(f"{plan.name}."): tensor for name, tensor in tensors.items() if name.startswith(plan.name)}
    run.plans[path] = plan.with_input_scale(layout.with_inputs.scale(own))


def apply(run: Run, block: Block) -> None:
    """Quantize the inputs of the block's layers as their plans say now: none for a layer that is kept in float."""
    plans = {path: run.plans[path] for path in block.linears if path in run.plans}
    inputs = {path: plan.scheme.inputs for path, plan in plans.items() if plan.scheme.inputs is not None}
    if inputs != block.inputs.schemes:
        block.quantize_inputs(inputs)
