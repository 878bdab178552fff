"""Quantize a model, one block at a time.  Read this page first.

    checkpoint ──► skeleton ──► block ──► observe ──► transform ──► round ──► refine ──► pack ──► checkpoint
                                  ▲                                                        │
    calibration ──► hidden ───────┴──────────────── next hidden (quantized weights) ◄──────┘

Only one block, its statistics and its activations are in memory, and of these no more than fit.  A finished block is on
disk before the next one starts, so an interrupted run continues at the first block that is missing, and ends in the
same bytes.
"""

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmq import algorithms, block_tuning
from llmq.algorithms import Options
from llmq.checkpoint.writer import Writer
from llmq.errors import FormatError
from llmq.formats import Layout, Reader
from llmq.methods import Method
from llmq.model import fold, observe
from llmq.model.block import Block
from llmq.model.flow import Flow
from llmq.model.observe import InputGroup
from llmq.model.skeleton import Call, Skeleton
from llmq.model.stream import Stream
from llmq.report.record import BlockReport, LayerReport, StageGain
from llmq.report.scoring import layer_report
from llmq.rounding import Rounded, round_group
from llmq.schemes import LayerPlan
from llmq.stats import InputStats

PROBE_TOKENS = 64  # what it takes to see which weights share an input, and what makes it
LOSS_TOKENS = 1024  # on which a transformation is chosen and proved

Observed = dict[InputGroup, InputStats]


@dataclass(frozen=True)
class Run:
    """Everything that stays the same from block to block; `plans` by the layer's path in the model."""

    skeleton: Skeleton
    stream: Stream | None  # the calibration text on its way through the blocks; None where a method needs none
    plans: Mapping[str, LayerPlan]
    method: Method
    options: Options
    layout: Layout
    reader: Reader  # reads back what `layout` packs
    writer: Writer


def quantize_blocks(run: Run) -> Iterator[LayerReport | BlockReport]:
    """Quantize every block and commit it; yields what became of each layer, and then of its block."""
    for index, block in enumerate(run.skeleton.blocks):
        start = time.monotonic()
        block.load()
        if run.stream is not None:
            run.stream.enter(block)
        if run.writer.has(index):  # an earlier run got this far
            report = restore(run, index, block)
            if run.stream is not None:
                run.stream.advance(block)
        else:
            report = yield from quantize_block(run, index, block, start)
        block.free()
        yield report


def quantize_block(run: Run, index: int, block: Block, start: float) -> Generator[LayerReport, None, BlockReport]:
    """observe → transform → round → pack → commit, for one block whose float weights are loaded."""
    groups = group_weights(run, block)
    notes = transform_block(run, block, groups) if run.method.transforms else []
    schemes = {path: run.plans[path].scheme for path in block.linears}
    tensors: dict[str, Tensor] = {}
    layers: list[LayerReport] = []
    to_tune: dict[str, Rounded] = {}
    flow = None if run.stream is None else run.stream.flow(block, groups)
    for group, stats in ((group, None) for group in groups) if flow is None else flow.statistics():
        if stats is not None and stats.tokens == 0:
            notes.append(f"{', '.join(group.names)}: left as they are, no calibration token was seen to reach them")
            continue
        weights = {path: block.weight(path) for path in group.names}
        for layer in round_group(weights, schemes, stats, run.method, run.options):
            packed = run.layout.pack(layer.rounding.quantized)
            rounded = layer.rounding.quantized.dequantize()
            block.set_weight(layer.path, rounded)  # what comes later sees this rounding
            name = run.plans[layer.path].name
            layers.append(layer_report(name, layer.weight, rounded, layer.rounding, packed, stats, layer.gains))
            yield layers[-1]
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
            if run.method.block_tuning is not None:
                to_tune[layer.path] = layer
    gain = None if flow is None else leave_block(run, block, flow, to_tune, tensors)
    replaced = {f"{layer.name}.weight" for layer in layers}
    tensors |= {name: tensor for name, tensor in block.stored_parameters().items() if name not in replaced}
    report = BlockReport(block.path, tuple(layers), tuple(notes), time.monotonic() - start, gain=gain)
    run.writer.commit(index, tensors, report.to_dict())
    return report


def group_weights(run: Run, block: Block) -> list[InputGroup]:
    """Which weights share an input, in the order in which they run; without text each weight stands alone."""
    if run.stream is None:
        return [InputGroup((path,), linear.in_features) for path, linear in block.linears.items()]
    return observe.input_groups(block, run.stream.sample(PROBE_TOKENS))


def leave_block(
    run: Run, block: Block, flow: Flow, layers: Mapping[str, Rounded], tensors: dict[str, Tensor]
) -> StageGain | None:
    """Take the text past the block, whose weights are all rounded by now.

    Where the method says so they are tuned together first, and packed into `tensors` once more.
    """
    stream, tuning = run.stream, run.method.block_tuning
    assert stream is not None
    if tuning is None or not layers or stream.fitted == stream.windows:  # without held-out text nothing would judge it
        stream.advance(block, flow.outputs, flow.original_outputs)
        return None
    stream.know_originals(block, flow.original_outputs)
    weights = {path: layer.rounding.quantized for path, layer in layers.items()}
    references = {path: layer.weight for path, layer in layers.items()}
    tuned = block_tuning.tune(run.skeleton, stream, block, weights, references, tuning)
    stream.advance(block, None if tuned.step else flow.outputs)
    for path, quantized in tuned.weights.items():
        packed = run.layout.pack(quantized)
        tensors |= {f"{run.plans[path].name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return StageGain("block_tuning", tuned.before, tuned.after, tuned.step > 0)


def transform_block(run: Run, block: Block, groups: Sequence[InputGroup]) -> list[str]:
    """Rewrite the float block by each transform of the method, on statistics of the float block."""
    assert run.stream is not None, "a method that transforms needs calibration"
    observed = observe.statistics(block, groups, run.stream.fitted_calls())
    notes = [note for stage in run.method.transforms for note in transform(run, stage, block, observed)]
    packed = {f"{run.plans[path].name}.weight" for path in block.linears if run.plans[path].scheme is not None}
    kept = {name: tensor for name, tensor in block.stored_parameters().items() if name not in packed}
    block.set_stored_parameters(kept)  # what a transform changed, in as few bits as the file holds it
    run.stream.transformed(block)
    return notes


def transform(run: Run, stage: str, block: Block, observed: Observed) -> Iterator[str]:
    """Rewrite the float block into an equal one that rounds better; a rewrite that moved its output is undone.

    Updates the statistics in `observed` to what the weights see now; yields what a user should know.
    """
    assert run.stream is not None, "a method that transforms needs calibration"
    kept = {path for path, plan in run.plans.items() if plan.scheme is None}
    found = fold.discover(block, list(observed), run.stream.sample(PROBE_TOKENS))
    sites = {site.group: site for site in found if f"{block.path}.{site.producer}" not in kept}
    call = run.stream.sample(LOSS_TOKENS)
    before = block.run(call)
    for group, stats in observed.items():
        if not all(run.plans[path].scheme for path in group.names):
            continue  # a layer that is to stay as it is is not scaled either
        if group not in sites:
            yield f"{', '.join(group.names)}: {stage} left out, nothing was found that makes their input"
            continue
        loss = partial(rounded_loss, run, block, group, stats, call, before)
        scales = algorithms.transform(stage).channel_scales(stats, sites[group].source, loss)
        if scales is None:
            continue
        undo, folded = fold.apply(block, sites[group], scales)
        change = fold.moved(call.hidden, before, block.run(call))
        if change <= fold.OUTPUT_TOLERANCE:
            observed[group] = stats.divided_by(folded)
        else:
            undo()
            yield f"{', '.join(group.names)}: {stage} undone, it moved the block's output by {change:.1e}"


def rounded_loss(
    run: Run, block: Block, group: InputGroup, stats: InputStats, call: Call, before: Tensor, scales: Tensor
) -> float:
    """Squared error of the block's output with the group's weights scaled, rounded, and scaled back."""
    plain = dataclasses.replace(run.method, alphas=(), refinements=())
    schemes = {path: run.plans[path].scheme for path in group.names}
    originals = {path: block.weight(path) for path in group.names}
    scaled = {path: weight * scales for path, weight in originals.items()}
    for layer in round_group(scaled, schemes, stats.divided_by(scales), plain, run.options):
        block.set_weight(layer.path, layer.rounding.quantized.dequantize() / scales)
    loss = float((block.run(call) - before).to(torch.float32).square().sum())
    for path, weight in originals.items():
        block.set_weight(path, weight)
    return loss


def restore(run: Run, index: int, block: Block) -> BlockReport:
    """Give a loaded block the weights that an earlier run committed for it."""
    tensors, record = run.writer.read(index)
    report = BlockReport.from_dict(record, resumed=True)
    paths = {plan.name: path for path, plan in run.plans.items()}
    for layer in report.layers:
        reading = run.reader(layer.name)
        if reading is None:
            raise FormatError(f"{layer.name} was committed packed, but is not to be quantized now")
        prefix = f"{layer.name}."
        packed = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        block.set_weight(paths[layer.name], run.layout.unpack(packed, reading).dequantize())
    block.set_stored_parameters(tensors)
    return report
