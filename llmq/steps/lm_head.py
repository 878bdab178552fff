"""`--quantize-head`: the layer that makes logits, quantized after the blocks as if it were one more.

It is fed what the final norm makes of the last block's output, so the model's own forward is run from there.  Stages
that tune blocks leave it alone: they come after it, or look at one block at a time.  A head that was tied to the
embedding has a weight of its own from then on, and the embedding stays in float.
"""

import time

from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.streams import Stream
from llmq.numerics.input_stats import InputStats
from llmq.report.layer_metrics import layer_report
from llmq.report.record import BlockReport
from llmq.steps.quantize_group import round_group
from llmq.steps.run import Run


def quantize_head(run: Run) -> None:
    """Quantize and commit the head, if that is planned; the blocks are done by then."""
    path, index, start = run.skeleton.head_path, len(run.skeleton.blocks), time.monotonic()
    plan = run.plans.get(path) if path is not None else None
    if path is None or plan is None or plan.scheme.weights is None:
        return
    if run.writer.has(index):
        _, record = run.writer.read(index)
        run.on_event(BlockReport.from_dict(record, resumed=True))
        return
    stats = None if run.streams is None else head_statistics(run.skeleton, run.streams.quantized)
    weight = run.skeleton.head_weight()  # (V, K)
    (layer,) = round_group({path: weight}, {path: plan.scheme.weights}, stats, run.method, run.options)
    packed = run.pack(path, layer.rounding.quantized)
    rounded = layer.rounding.quantized.dequantize()
    report = layer_report(plan.name, weight, rounded, layer.rounding, packed, stats, layer.gains)
    run.on_event(report)
    done = BlockReport(path, (report,), (), time.monotonic() - start)
    run.writer.commit(index, packed, done.to_dict())
    run.on_event(done)


def head_statistics(skeleton: Skeleton, stream: Stream) -> InputStats:
    """The statistics of what the head is fed, for a text that is behind all blocks."""
    text, stats = stream.text, None
    for number, batch in enumerate(text.batches()):
        inputs = skeleton.head_input(text.of(batch), stream.last(batch))
        if stats is None:
            stats = InputStats(inputs.shape[-1], inputs.device)
            judge = stats.hold_out() if text.validation else stats
        (stats if number < text.fitted_batches else judge).update(inputs)
    assert stats is not None, "the text is empty"
    return stats
