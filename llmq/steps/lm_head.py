"""`--quantize-head`: quantize the head, the layer that makes logits, after the blocks and like one more block.

Its input is the output of the last block after the final norm, so the model's forward is run from there. Block tuning
and end-to-end tuning do not change it. A head that was tied to the embedding gets a separate weight, and the embedding
is kept in float.
"""

import time

from llmq import memory
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.streams import Stream
from llmq.numerics.input_stats import InputStats
from llmq.report.layer_metrics import layer_report
from llmq.report.peak import peak_memory
from llmq.report.record import BlockReport
from llmq.steps import existing_grids
from llmq.steps.round_group import Rounded
from llmq.steps.round_together import Group, round_together
from llmq.steps.run import Run

FLOAT_HEAD = (
    "tuning minimizes the KL divergence with the float head, so it does not compensate for the error of the quantized "
    "head"
)


def quantize_head(run: Run) -> None:
    """Quantize and commit the head, if the plan includes it, after all blocks."""
    path, index, start = run.skeleton.head_path, len(run.skeleton.blocks), time.monotonic()
    plan = run.plans.get(path) if path is not None else None
    if path is None or plan is None or plan.scheme.weights is None:
        return
    if run.writer.has(index):
        _, record = run.committed(index)
        run.on_event(BlockReport.from_dict(record, resumed=True))
        return
    stats = None if run.streams is None else head_statistics(run.skeleton, run.streams.quantized)
    if stats is not None:
        stats.sum_over(run.ranks)
    weight = run.skeleton.head_weight()  # (V, K)
    stored = run.skeleton.weights.original(f"{path}.weight").dtype
    scheme = plan.scheme.weights
    kept = run.ranks.first(lambda: existing_grids.kept(run, weight, stored, scheme))
    if kept is not None:
        layer = Rounded(path, weight, kept)
    else:
        group = Group({path: weight}, {path: scheme}, stats, importance=run.importance_of(path))
        [[layer]] = round_together([group], run.method, run.options, run.ranks)
    packed = run.pack(path, layer.rounding.quantized)
    dequantized = layer.rounding.quantized.dequantize()
    report = layer_report(
        plan.name, weight, dequantized, layer.rounding, packed, stats, layer.gains, run.ranks, options=run.options
    )
    run.on_event(report)
    block_report = BlockReport(
        path, (report,), (), time.monotonic() - start, host_bytes=peak_memory(),
        device_bytes=memory.peak(run.skeleton.device),
    )  # fmt: skip
    run.writer.commit(index, packed, block_report.to_dict())
    run.on_event(block_report)


def head_statistics(skeleton: Skeleton, stream: Stream) -> InputStats:
    """The statistics of the head's input, for a text that has passed all blocks."""
    text, stats = stream.text, None
    for number, batch in enumerate(text.batches()):
        inputs = skeleton.head_input(text.of(batch), stream.last(batch))
        if stats is None:
            stats = InputStats(inputs.shape[-1], inputs.device, unit=text.unit * text.length)
            validation = stats.begin_validation() if text.validates else stats
        (stats if number < text.fitted_batches else validation).update(inputs)
    assert stats is not None, "the text is empty"
    return stats
