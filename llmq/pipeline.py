"""Quantize a model, one block at a time. Read this page first.

                                             for each group of layers that share an input
                                            ┌─────────────────────────────────────────────┐
    checkpoint ──► block ──► transform ──►  │ collect statistics ──► quantize ──► pack     │ ──► tune ──► commit
                     ▲                      └─────────────────────────────────────────────┘              │
    calibration ──► hidden states ◄───────────────────────── text advanced past the quantized block ◄────┘

`quantize_model` is the whole run: every block, then the head, then tuning of all blocks together, then saving.
`quantize_block` is the whole story of one block:

    keep grids          weights that already lie on a grid are stored on it, and no later stage changes them
    transform           rewrite the float block into an equal one with less quantization error (scales, rotations)
    collect statistics  run the calibration text up to the group, and sum up its inputs (the Hessian); a static scale
                        of the inputs is chosen, if they are quantized
    check the range     a weight whose scales the format cannot hold gets float32 scales, another grid, or float
    quantize            round the weights to codes and scales; later groups get inputs from the quantized weights
    repair              a layer that would lose its output gets smaller groups, then 8 bits, then float
    pack                convert to the tensors of the file format
    tune                adjust all quantized weights of the block together, and pack them again (if the method does so)
    commit              write the block to the output folder; an interrupted run continues after it

Layers that share an input (q, k and v) are one group and share its statistics. The text goes through the blocks in two
streams: `quantized` has the hidden states of the quantized model, `floats` those of the float model to compare with.

One block is processed at a time, while the next one is read and the previous one is written. Block i is on disk before
block i + 2 is started, so an interrupted run continues at the first missing block and produces the same bytes.

Where to look: `model/passes/` runs the text through the blocks, `steps/` runs the stages on a model, `algorithms/` has
their maths, `methods.py` says which stages a method consists of.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llmq import memory
from llmq.algorithms import Rounding
from llmq.memory import PROBE_TOKENS
from llmq.model.analyse import input_groups
from llmq.model.analyse.input_groups import InputGroup
from llmq.model.build.block import Block
from llmq.model.passes.forward import forward
from llmq.model.passes.sequential import Sequential
from llmq.numerics.input_stats import InputStats
from llmq.report.layer_metrics import as_experts, layer_report
from llmq.report.peak import peak_memory
from llmq.report.record import BlockReport, LayerReport, StageGain
from llmq.steps import block_tuning, existing_grids, input_scales, repair
from llmq.steps.end_to_end import tune_end_to_end
from llmq.steps.lm_head import quantize_head
from llmq.steps.round_group import Rounded
from llmq.steps.round_together import Group, round_together
from llmq.steps.run import Run
from llmq.steps.scale_range import in_range
from llmq.steps.transforms import transform_block


def quantize_model(run: Run, save: Callable[[Run], None]) -> None:
    """Quantize and commit every block, then the head; tune all blocks together; save the finished model."""
    forward(run.skeleton, lambda block: quantize_block(run, block))
    quantize_head(run)
    if only_the_first_is_left(run):
        tune_end_to_end(run)
        save(run)


def only_the_first_is_left(run: Run) -> bool:
    """Collect what the ranks have for end-to-end tuning, and let all but the first leave; whether this is the first."""
    if run.method.tuning is not None and run.streams is not None:
        run.streams.gather()
    run.ranks.leave()
    return run.ranks.is_first


@dataclass
class BlockResult:
    """What quantizing a block has produced so far.

    layers   by path, the quantized weights that block tuning will adjust
    tensors  by name, the packed tensors to commit
    reports  one per quantized layer
    notes    what the user should know
    gains    what transforms and block tuning have gained
    kept     by path, the weights that already lie on a grid
    """

    layers: dict[str, Rounded] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gains: list[StageGain] = field(default_factory=list)
    kept: Mapping[str, Rounding] = field(default_factory=dict)


def quantize_block(run: Run, block: Block) -> None:
    """Transform, quantize group by group, tune, and commit one block whose float weights are loaded.

    A block that an interrupted run committed is restored instead. In both cases the text is advanced past the block.
    """
    start, result = time.monotonic(), BlockResult()
    if run.streams is not None:
        run.streams.enter(block)  # keeps a copy of the float weights for the float stream
    if run.writer.has(block.index):
        restore_block(run, block)
        return
    result.kept = run.ranks.first(lambda: existing_grids.kept_in(run, block))
    if run.streams is None:  # no calibration text: every layer is a separate group, without statistics
        for unit in repair.fused(block, block.linears):
            groups = [InputGroup((path,), block.linears[path].in_features) for path in unit]
            quantize_groups(run, block, result, [(group, None) for group in groups])
    else:
        probe = run.streams.quantized.sample(PROBE_TOKENS)
        groups = run.ranks.first(lambda: input_groups.input_groups(block, probe))
        if run.method.transforms:
            result.notes, result.gains = transform_block(run, block, groups, result.kept)
        with Sequential(block, groups, run.streams) as forwards:
            forwards.run(lambda groups: quantize_groups(run, block, result, groups))
            tune_and_advance(run, block, result, forwards)
    tensors = result.tensors | kept_in_float(run, block, result)
    report = BlockReport(
        block.path, tuple(result.reports), tuple(result.notes), time.monotonic() - start, gains=tuple(result.gains),
        host_bytes=peak_memory(), device_bytes=memory.peak(run.skeleton.device),
    )  # fmt: skip
    run.writer.commit(block.index, tensors, report.to_dict())
    run.on_event(report)


def quantize_groups(
    run: Run, block: Block, result: BlockResult, groups: Sequence[tuple[InputGroup, InputStats | None]]
) -> None:
    """Quantize and pack the weights that share an input, and put the quantized weights into the block.

    There is one group, or, with several ranks, one per rank. Weights that lie on a grid already are kept on it. A layer
    that would lose its output gets another grid (see `repair.py`).
    """
    reached: list[Group] = []
    for group, stats in groups:
        result.notes += input_scales.measure(run, block, group, stats)
        for path in group.names:
            if path in result.kept:
                on_its_grid = Rounded(path, block.weight(path), result.kept[path])
                put(run, block, result, pack(run, block, on_its_grid, stats))
        weights = {path: block.weight(path) for path in group.names if path not in result.kept}
        if weights and stats is not None and stats.tokens == 0:
            result.notes.append(f"{', '.join(weights)}: kept in float, no calibration token reached them")
        elif weights:
            schemes = {path: run.plans[path].scheme.weights for path in weights}
            importance = run.importance_of(group.names[0])
            reached.append(Group(weights, schemes, stats, run.scales_of(weights), importance))
    reached, notes = in_range(run, block, reached)
    result.notes += notes
    while reached:
        solved = zip(reached, round_together(reached, run.method, run.options, run.ranks), strict=True)
        packed = [pack(run, block, layer, group.stats) for group, layers in solved for layer in layers]
        errors = {layer.path: layer.report.error for layer in packed}
        reached, changed, notes = repair.to_round_again(run, block, reached, errors)
        result.notes += notes
        for layer in packed:
            if layer.path not in changed:
                put(run, block, result, layer)
    input_scales.apply(run, block)  # a layer may be kept in float now


@dataclass(frozen=True)
class PackedLayer:
    """A quantized layer, its tensors in the file by their names, and its report."""

    rounded: Rounded
    tensors: Mapping[str, Tensor]
    report: LayerReport

    @property
    def path(self) -> str:
        return self.rounded.path


def pack(run: Run, block: Block, layer: Rounded, stats: InputStats | None) -> PackedLayer:
    """Pack a quantized weight and measure its errors."""
    tensors, dequantized = run.pack(layer.path, layer.rounding.quantized), layer.rounding.quantized.dequantize()
    name = run.plans[layer.path].name
    experts = block.is_experts(layer.path)
    report = layer_report(
        name, layer.weight, dequantized, layer.rounding, tensors, stats, layer.gains, run.ranks,
        options=None if experts else run.options,
    )  # fmt: skip
    report = as_experts(report, run.method.transforms) if experts else report
    return PackedLayer(layer, tensors, report)


def put(run: Run, block: Block, result: BlockResult, layer: PackedLayer) -> None:
    """Put a quantized weight into the block, and report on it."""
    block.set_weight(layer.path, layer.rounded.rounding.quantized.dequantize())
    run.on_event(layer.report)
    result.reports.append(layer.report)
    result.tensors |= layer.tensors
    if run.method.block_tuning is not None and layer.path not in result.kept:
        result.layers[layer.path] = layer.rounded


def tune_and_advance(run: Run, block: Block, result: BlockResult, forwards: Sequential) -> None:
    """Advance the text past the block, whose weights are all quantized now.

    If the method has block tuning, the weights are first tuned together and packed again.
    """
    streams, tuning = run.streams, run.method.block_tuning
    assert streams is not None
    if streams.floats is not None:
        forwards.finish(streams.floats)
    if tuning is not None and result.layers and streams.text.validates:  # validation text shows whether it helps
        forwards.forget()  # tuning runs the block from its inputs, and needs the memory
        metric = run.fisher.output_metric(block.index) if run.fisher is not None and tuning.fisher else None
        tuned = block_tuning.tune(run.skeleton, streams, block, result.layers, tuning, metric, run.on_event)
        for path, quantized in tuned.weights.items():
            result.tensors |= run.pack(path, quantized)
        result.gains.append(StageGain("block_tuning", tuned.before, tuned.after, tuned.step > 0))
        streams.quantized.run(block)
    else:
        forwards.finish(streams.quantized)
    streams.advance()


def kept_in_float(run: Run, block: Block, result: BlockResult) -> dict[str, Tensor]:
    """The block's parameters that are not quantized, with the names and dtypes of the checkpoint."""
    packed = {report.name for report in result.reports}
    replaced = {f"{name}.weight" for name in packed}
    left_stacked = run.skeleton.weights.left_stacked
    stored = block.stored_parameters()
    return {n: tensor for n, tensor in stored.items() if n not in replaced and not left_stacked(n, packed)}


def restore_block(run: Run, block: Block) -> None:
    """Put the weights that an interrupted run committed into the loaded block, and advance the text past it."""
    tensors, record = run.committed(block.index)
    report = BlockReport.from_dict(record, resumed=True)
    for layer in report.layers:
        path = run.paths[layer.name]
        run.plans[path] = repair.restored(run.plans[path], layer.scheme)
        input_scales.restore(run, block, path, tensors)
        block.set_weight(path, run.unpack(layer.name, tensors).dequantize())
    replaced = {f"{layer.name}.weight" for layer in report.layers}  # a format may use this name for packed values
    names = [name for name in block.stored_names() if name in tensors and name not in replaced]
    block.set_stored_parameters({name: tensors[name] for name in names})
    input_scales.apply(run, block)
    if run.streams is not None:
        run.streams.past(block)
    run.on_event(report)
