"""Quantize a model, one block at a time.  Read this page first.

    checkpoint ──► skeleton ──► block ──► observe ──► transform ──► quantize ──► tune ──► pack ──► checkpoint
                                  ▲                                                  │
    calibration ──► hidden states ┴───────── of the next block (quantized weights) ◄─┘

then the head, then tuning of all blocks together, then saving.  Only one block, its statistics and its activations are
in memory, and of these no more than fit.  A finished block is on disk before the one after the next starts, so an
interrupted run continues at the first block that is missing, and ends in the same bytes.

Where to look: how text goes through the blocks is in `model/passes/`, the stages run on a model are in `steps/`, their
maths is in `algorithms/`, what a method consists of is in `methods.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from llmq.memory import PROBE_TOKENS
from llmq.model.analyse import input_groups
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.passes.forward import forward
from llmq.model.passes.sequential import Sequential
from llmq.numerics.input_stats import InputStats
from llmq.report.layer_metrics import as_experts, layer_report
from llmq.report.record import BlockReport, LayerReport, StageGain
from llmq.steps import block_tuning
from llmq.steps.end_to_end import tune_end_to_end
from llmq.steps.lm_head import quantize_head
from llmq.steps.quantize_group import Rounded, round_group
from llmq.steps.run import Run
from llmq.steps.transforms import transform_block


def quantize_model(run: Run, save: Callable[[], None]) -> None:
    """Quantize every block and commit it, then the head; tune all of them together; save the finished model."""
    forward(run.skeleton, lambda block: quantize_block(run, block))
    quantize_head(run)
    tune_end_to_end(run)
    save()


@dataclass
class Work:
    """What becomes of a block: the layers that are quantized, their packed tensors, notes and gains for the report."""

    layers: dict[str, Rounded] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gains: list[StageGain] = field(default_factory=list)


def quantize_block(run: Run, block: Block) -> None:
    """observe → transform → quantize → tune → pack → commit, for one block whose float weights are loaded.

    A block that an earlier run committed is taken over.  The calibration text is behind the block at the end.
    """
    start, work = time.monotonic(), Work()
    if run.streams is not None:
        run.streams.enter(block)
    if run.writer.has(block.index):
        restore(run, block)
        return
    if run.streams is None:  # without text each weight stands alone
        for path, linear in block.linears.items():
            quantize_group(run, block, work, InputGroup((path,), linear.in_features), None)
    else:
        groups = input_groups.input_groups(block, run.streams.quantized.sample(PROBE_TOKENS))
        if run.method.transforms:
            work.notes, work.gains = transform_block(run, block, groups)
        with Sequential(block, groups, run.streams) as forwards:
            forwards.run(lambda group, stats: quantize_group(run, block, work, group, stats))
            leave_block(run, block, forwards, work)
    tensors = work.tensors | kept_in_float(run, block, work)
    seconds = time.monotonic() - start
    report = BlockReport(block.path, tuple(work.reports), tuple(work.notes), seconds, gains=tuple(work.gains))
    run.writer.commit(block.index, tensors, report.to_dict())
    run.on_event(report)


def quantize_group(run: Run, block: Block, work: Work, group: InputGroup, stats: InputStats | None) -> None:
    """Quantize and pack the weights that share an input; what comes later in the block sees the quantized ones."""
    if stats is not None and stats.tokens == 0:
        work.notes.append(f"{', '.join(group.names)}: kept in float, no calibration token reached them")
        return
    weights = {path: block.weight(path) for path in group.names}
    schemes = {path: run.plans[path].scheme.weights for path in group.names}
    for layer in round_group(weights, schemes, stats, run.method, run.options):
        rounded = layer.rounding.quantized.dequantize()
        block.set_weight(layer.path, rounded)
        packed = run.pack(layer.path, layer.rounding.quantized)
        name = run.plans[layer.path].name
        report = layer_report(name, layer.weight, rounded, layer.rounding, packed, stats, layer.gains)
        report = as_experts(report, run.method.transforms) if block.is_experts(layer.path) else report
        run.on_event(report)
        work.reports.append(report)
        work.tensors |= packed
        if run.method.block_tuning is not None:
            work.layers[layer.path] = layer


def leave_block(run: Run, block: Block, forwards: Sequential, work: Work) -> None:
    """Take the text past the block, whose weights are all quantized by now.

    Where the method says so they are tuned together first, and packed once more.
    """
    streams, tuning = run.streams, run.method.block_tuning
    assert streams is not None
    if streams.floats is not None:
        forwards.finish(streams.floats)
    if tuning is not None and work.layers and streams.text.validation:  # without that text nothing would judge it
        tuned = block_tuning.tune(run.skeleton, streams, block, work.layers, tuning)
        for path, quantized in tuned.weights.items():
            work.tensors |= run.pack(path, quantized)
        work.gains.append(StageGain("block_tuning", tuned.before, tuned.after, tuned.step > 0))
        streams.quantized.run(block)
    else:
        forwards.finish(streams.quantized)
    streams.advance()


def kept_in_float(run: Run, block: Block, work: Work) -> dict[str, Tensor]:
    """The block's other parameters as the checkpoint names and stores them."""
    packed = {report.name for report in work.reports}
    replaced = {f"{name}.weight" for name in packed}
    left_stacked = run.skeleton.weights.left_stacked
    stored = block.stored_parameters()
    return {n: tensor for n, tensor in stored.items() if n not in replaced and not left_stacked(n, packed)}


def restore(run: Run, block: Block) -> None:
    """Give a loaded block the weights that an earlier run committed for it, and take the text past it."""
    tensors, record = run.writer.read(block.index)
    report = BlockReport.from_dict(record, resumed=True)
    paths = {plan.name: path for path, plan in run.plans.items()}
    for layer in report.layers:
        block.set_weight(paths[layer.name], run.unpack(layer.name, tensors).dequantize())
    block.set_stored_parameters(tensors)
    if run.streams is not None:
        run.streams.past(block)
    run.on_event(report)
