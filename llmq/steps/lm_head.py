"""`--quantize-head`: the layer that makes logits, rounded after the blocks as if it were one more.

It is fed what the final norm makes of the last block's output, so the model's own forward is run from there.  Stages
that tune blocks leave it alone: they come after it, or look at one block at a time.  A head that was tied to the
embedding has a weight of its own from then on, and the embedding stays as it is.
"""

import time
from collections.abc import Iterator

from llmq.report.layer_metrics import layer_report
from llmq.report.record import BlockReport, LayerReport
from llmq.steps.quantize_group import round_group
from llmq.steps.run import Run


def quantize_head(run: Run) -> Iterator[LayerReport | BlockReport]:
    """Round and commit the head, if that is planned; the blocks are done by then."""
    path, index, start = run.skeleton.head_path, len(run.skeleton.blocks), time.monotonic()
    plan = run.plans.get(path) if path is not None else None
    if path is None or plan is None or plan.scheme.weights is None:
        return
    if run.writer.has(index):
        _, record = run.writer.read(index)
        yield BlockReport.from_dict(record, resumed=True)
        return
    stats = None if run.stream is None else run.stream.head_statistics()
    weight = run.skeleton.head_weight()  # (V, K)
    (layer,) = round_group({path: weight}, {path: plan.scheme.weights}, stats, run.method, run.options)
    packed = run.layout.pack(layer.rounding.quantized)
    rounded = layer.rounding.quantized.dequantize()
    report = layer_report(plan.name, weight, rounded, layer.rounding, packed, stats, layer.gains)
    yield report
    done = BlockReport(path, (report,), (), time.monotonic() - start)
    run.writer.commit(index, {f"{plan.name}.{suffix}": tensor for suffix, tensor in packed.items()}, done.to_dict())
    yield done
