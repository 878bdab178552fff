"""Quantize a model, one block at a time.  Read this page first.

    checkpoint ──► skeleton ──► block ──► observe ──► transform ──► round ──► refine ──► pack ──► checkpoint
                                  ▲                                                        │
    calibration ──► hidden ───────┴──────────────── next hidden (quantized weights) ◄──────┘

Only one block, its statistics and its activations are in memory, and of these no more than fit.  A finished block is on
disk before the next one starts, so an interrupted run continues at the first block that is missing, and ends in the
same bytes.  What tunes all blocks together comes when they are all there: `tuning/`.
"""

import dataclasses
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from llmq import algorithms
from llmq.errors import FormatError
from llmq.model.analyse import fold, input_groups
from llmq.model.analyse.fold import FoldSite
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Call
from llmq.model.passes.sequential import Flow
from llmq.numerics.block_diagonal import columns, inverse
from llmq.numerics.input_stats import InputStats
from llmq.report.layer_metrics import as_experts, layer_report
from llmq.report.record import BlockReport, LayerReport, StageGain
from llmq.steps import block_tuning
from llmq.steps.quantize_group import Rounded, round_group
from llmq.steps.run import Run

PROBE_TOKENS = 64  # what it takes to see which weights share an input, and what makes it
LOSS_TOKENS = 1024  # on which a transformation is chosen and proved

Observed = dict[InputGroup, InputStats]


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
    notes, gains = transform_block(run, block, groups) if run.method.transforms else ([], [])
    schemes = {path: run.plans[path].scheme.weights for path in block.linears}
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
            if block.is_experts(layer.path):
                layers[-1] = as_experts(layers[-1], run.method.transforms)
            yield layers[-1]
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
            if run.method.block_tuning is not None:
                to_tune[layer.path] = layer
    if flow is not None:
        gains += leave_block(run, block, flow, to_tune, tensors)
    packed_names = {layer.name for layer in layers}
    replaced = {f"{name}.weight" for name in packed_names}
    for name, tensor in block.stored_parameters().items():
        if name not in replaced and not run.skeleton.weights.left_stacked(name, packed_names):
            tensors[name] = tensor
    report = BlockReport(block.path, tuple(layers), tuple(notes), time.monotonic() - start, gains=tuple(gains))
    run.writer.commit(index, tensors, report.to_dict())
    return report


def group_weights(run: Run, block: Block) -> list[InputGroup]:
    """Which weights share an input, in the order in which they run; without text each weight stands alone."""
    if run.stream is None:
        return [InputGroup((path,), linear.in_features) for path, linear in block.linears.items()]
    return input_groups.input_groups(block, run.stream.sample(PROBE_TOKENS))


def leave_block(
    run: Run, block: Block, flow: Flow, layers: Mapping[str, Rounded], tensors: dict[str, Tensor]
) -> list[StageGain]:
    """Take the text past the block, whose weights are all rounded by now.

    Where the method says so they are tuned together first, and packed into `tensors` once more.
    """
    stream, tuning = run.stream, run.method.block_tuning
    assert stream is not None
    if tuning is None or not layers or stream.fitted == stream.windows:  # without held-out text nothing would judge it
        stream.advance(block, flow.outputs, flow.original_outputs)
        return []
    stream.know_originals(block, flow.original_outputs)
    weights = {path: layer.rounding.quantized for path, layer in layers.items()}
    references = {path: layer.weight for path, layer in layers.items()}
    tuned = block_tuning.tune(run.skeleton, stream, block, weights, references, tuning)
    stream.advance(block, None if tuned.step else flow.outputs)
    for path, quantized in tuned.weights.items():
        packed = run.layout.pack(quantized)
        tensors |= {f"{run.plans[path].name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return [StageGain("block_tuning", tuned.before, tuned.after, tuned.step > 0)]


def transform_block(run: Run, block: Block, groups: Sequence[InputGroup]) -> tuple[list[str], list[StageGain]]:
    """Rewrite the float block by each transform of the method, on statistics of the float block.

    Returns what a user should know, and what each rewrite won.
    """
    assert run.stream is not None, "a method that transforms needs calibration"
    shared = [group for group in groups if not block.is_experts(group.names[0])]  # experts are left out, which is noted
    observed = input_groups.statistics(block, shared, run.stream.fitted_calls())
    told = [each for stage in run.method.transforms for each in transform(run, stage, block, observed)]
    packed = {f"{run.plans[path].name}.weight" for path in block.linears if run.plans[path].scheme.weights is not None}
    kept = {name: tensor for name, tensor in block.stored_parameters().items() if name not in packed}
    block.set_stored_parameters(kept)  # what a transform changed, in as few bits as the file holds it
    run.stream.transformed(block)
    return [each for each in told if isinstance(each, str)], [each for each in told if isinstance(each, StageGain)]


def transform(run: Run, stage: str, block: Block, observed: Observed) -> Iterator[str | StageGain]:
    """Rewrite the float block into an equal one that rounds better, in one place after the other.

    Updates the statistics in `observed` to what the weights see now.
    """
    assert run.stream is not None, "a method that transforms needs calibration"
    kept = {path for path, plan in run.plans.items() if plan.scheme.weights is None}
    probe, call = run.stream.sample(PROBE_TOKENS), run.stream.sample(LOSS_TOKENS)
    found = fold.discover(block, list(observed), probe)
    kept |= {path for path in made_by(found, block) if run.skeleton.weights.is_fixed(f"{path}.weight")}
    sites = {site.group: site for site, path in zip(found, made_by(found, block), strict=True) if path not in kept}
    with block.float_inputs():
        before = block.run(call)
    for group, stats in observed.items():
        if not all(run.plans[path].scheme.weights for path in group.names):
            continue  # a layer that is to stay as it is is not rewritten either
        if group not in sites:
            yield f"{', '.join(group.names)}: {stage} left out, nothing was found that makes their input"
            continue
        site = sites[group]
        width = partial(fold.mixing_width, block, site, probe)
        loss = partial(loss_in_basis, run, block, group, stats, call, before)
        basis = algorithms.transform(stage).basis(stats, site.source, width, loss)
        if basis is not None:
            yield from rewrite(run, stage, block, observed, site, basis)


def made_by(sites: Sequence[FoldSite], block: Block) -> list[str]:
    """The path of what makes the input, site by site."""
    return [f"{block.path}.{site.producer}" for site in sites]


def rewrite(
    run: Run, stage: str, block: Block, observed: Observed, site: FoldSite, basis: Tensor
) -> Iterator[str | StageGain]:
    """Fold a basis into its site; undone, bit for bit, if it moves the block's output or does not let it round better.

    The latter is judged on held-out windows, with the weights on both sides rounded.
    """
    assert run.stream is not None, "a method that transforms needs calibration"
    call, judged = run.stream.sample(LOSS_TOKENS), run.stream.held_out_sample(LOSS_TOKENS)
    with block.float_inputs():  # what to come close to is the float model's
        before = block.run(call)
        target = block.run(judged) if judged else before
    paths = {*site.group.names, f"{block.path}.{site.producer}"}
    loss = partial(rounded_loss, run, block, paths, judged or call, target)
    plain = loss(observed)
    undo, folded = fold.apply(block, site, basis)
    with block.float_inputs():
        change = fold.moved(call.hidden, before, block.run(call))
    if change > fold.OUTPUT_TOLERANCE:
        undo()
        yield f"{', '.join(site.group.names)}: {stage} undone, it moved the block's output by {change:.1e}"
        return
    rewritten = loss({**observed, site.group: observed[site.group].in_basis(folded)})
    if rewritten < plain:
        observed[site.group] = observed[site.group].in_basis(folded)
    else:
        undo()
    if judged:
        yield StageGain(stage, plain, rewritten, rewritten < plain)


def rounded_loss(
    run: Run, block: Block, paths: Collection[str], call: Call, before: Tensor, observed: Observed
) -> float:
    """Squared error of the block's output, a token, with those of its layers rounded that are in `paths`."""
    rounded: dict[str, Tensor] = {}
    for group, stats in observed.items():
        weights = {path: block.weight(path) for path in group.names if path in paths}
        rounded |= {layer.path: layer.rounding.quantized.dequantize() for layer in round_plainly(run, weights, stats)}
    return output_loss(block, rounded, call, before)


def loss_in_basis(
    run: Run, block: Block, group: InputGroup, stats: InputStats, call: Call, before: Tensor, basis: Tensor
) -> float:
    """The same with the group's weights rounded in another basis, and brought back from it."""
    weights = {path: columns(block.weight(path), basis) for path in group.names}
    layers = round_plainly(run, weights, stats.in_basis(basis))
    back = inverse(basis)
    rounded = {layer.path: columns(layer.rounding.quantized.dequantize(), back) for layer in layers}
    return output_loss(block, rounded, call, before)


def round_plainly(run: Run, weights: Mapping[str, Tensor], stats: InputStats) -> Iterator[Rounded]:
    """Round as the method does, by its rounding stage alone."""
    plain = dataclasses.replace(run.method, alphas=(), refinements=())
    return round_group(weights, {path: run.plans[path].scheme.weights for path in weights}, stats, plain, run.options)


def output_loss(block: Block, weights: Mapping[str, Tensor], call: Call, before: Tensor) -> float:
    """‖f(x; Ŵ) - f(x; W)‖² a token, the latter being `before`; the block has its own weights again afterwards."""
    originals = {path: block.weight(path) for path in weights}
    for path, weight in weights.items():
        block.set_weight(path, weight)
    loss = float((block.run(call) - before).to(torch.float32).square().sum()) / call.hidden[..., 0].numel()
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
