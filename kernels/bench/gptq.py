"""GPTQ of a model with the dimensions of Llama 3.1 8B, step by step, by the pipeline of llmq.

Weights and text are random, made on the device when they are read, so the figures do not include loading; saving is
shown separately.  A few blocks are run with every step timed, and their seconds are extrapolated to the whole model,
which the record states; then, if there is time, the whole model is run without the stopwatch.
"""

import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from bench import gptq_steps, random_model
from bench.gptq_steps import TOKENS_PER_BATCH, activation_dtype
from bench.plan import Plan
from bench.session import Result, Session
from bench.stopwatch import Stopwatch, watching
from bench.timing import now
from llmq import algorithms, formats, pipeline
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import forward
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Streams, Text
from llmq.report.events import Event, OnEvent, ignore
from llmq.report.record import BlockReport
from llmq.steps import layer_plans
from llmq.steps.run import Run

# (label, function whose time it gets).  A label may have several functions; time in none of them goes to `rest`.
STEPS = (
    ("make weights", "llmq.model.build.block:Block.load"),
    ("forward", "llmq.model.build.block:Block.run"),
    ("hessian", "llmq.numerics.input_stats:InputStats.update"),
    ("factorize", "llmq.steps.round_group:factorize"),
    ("search scales", "llmq.numerics.affine_grid:fit_searched"),
    ("round", "llmq.algorithms.gptq:compensate"),
    ("compare with nearest", "llmq.algorithms.gptq:without_worse_rows"),
    ("report", "llmq.pipeline:layer_report"),
    ("save", "llmq.checkpoint.writer:Writer.commit"),
)
NOT_COUNTED = ("make weights", "save")
# Seconds for the whole of Llama 3.1 8B, 128 x 2048 tokens, on one H200 (790 TFLOP/s bf16, 4.3 TB/s): arithmetic.
# `round` is the block kernel, 0.4, and the products for the columns after a block, 1.0; `gptq_steps` times both.
FLOORS = {"forward": 11.5, "hessian": 3.3, "factorize": 2.0, "round": 1.4}
PACK = "pack"
TARGET_SECONDS = 60.0
MARGIN = 1.2  # of the expected time must be left before the whole model is started


def measure(plan: Plan, session: Session) -> None:
    """Cases: those of `gptq_steps`, few blocks, whole model."""
    device = torch.device(plan.device)
    gptq_steps.measure(plan, session)
    few = session.run("few blocks", partial(few_blocks, plan, session, device))
    if few is not None:
        session.run("whole model", partial(whole_model, plan, session, device), needs=MARGIN * few["expected_seconds"])


def few_blocks(plan: Plan, session: Session, device: torch.device) -> Result:
    """Every step on a few blocks, without the first, a warm-up, and the last, which no forward follows."""
    stopwatch = Stopwatch(partial(now, device))
    with tempfile.TemporaryDirectory() as folder:
        blocks: list[Mapping[str, float]] = []

        def note(event: Event) -> None:
            if isinstance(event, BlockReport):
                blocks.append(stopwatch.taken())
                session.report(f"block {len(blocks)} of {plan.few_blocks}, {sum(blocks[-1].values()):.2f} s")

        run = pipeline_run(plan, Path(folder), plan.few_blocks, device, note)
        points = (*STEPS, (PACK, "llmq.formats.codecs.bit_packing:pack"))
        with watching(stopwatch, points) as missing:
            forward(run.skeleton, partial(pipeline.quantize_block, run))
            run.writer.settle()
    counted = blocks[1:-1] or blocks[-1:]
    times = plan.llama.blocks / len(counted)
    labels = sorted({label for block in counted for label in block})
    steps = {label: times * sum(block.get(label, 0.0) for block in counted) for label in labels}
    total = sum(seconds for label, seconds in steps.items() if label not in NOT_COUNTED)
    floors = FLOORS if plan.name == "full" else {}
    return {
        "extrapolated": True, "blocks": len(blocks), "counted_blocks": len(counted), "of_blocks": plan.llama.blocks,
        "tokens": plan.windows * plan.tokens, "steps": steps, "floors": floors, "first_block": dict(blocks[0]),
        "not_watched": missing, "seconds": total, "expected_seconds": sum(steps.values()),
        "summary": f"{total:.1f} s for {plan.llama.blocks} blocks, extrapolated from {len(counted)}",
    }  # fmt: skip


def whole_model(plan: Plan, session: Session, device: torch.device) -> Result:
    """All blocks; only making the weights and saving are timed, to subtract them."""
    stopwatch = Stopwatch(partial(now, device))
    watched = [point for point in STEPS if point[0] in NOT_COUNTED]
    with tempfile.TemporaryDirectory() as folder:
        start, finished = time.monotonic(), 0

        def note(event: Event) -> None:
            nonlocal finished
            if isinstance(event, BlockReport):
                finished += 1
                session.report(f"block {finished} of {plan.llama.blocks}, {time.monotonic() - start:.1f} s")

        run = pipeline_run(plan, Path(folder), plan.llama.blocks, device, note)
        with watching(stopwatch, watched):
            forward(run.skeleton, partial(pipeline.quantize_block, run))
            run.writer.settle()
    seconds = stopwatch.taken()
    total = sum(value for label, value in seconds.items() if label not in NOT_COUNTED)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "extrapolated": False, "of_blocks": finished, "tokens": plan.windows * plan.tokens, "seconds": total,
        "apart": {label: seconds.get(label, 0.0) for label in NOT_COUNTED}, "peak_memory_bytes": peak,
        "target_seconds": TARGET_SECONDS, "summary": f"{total:.1f} s without loading and saving",
    }  # fmt: skip


def pipeline_run(plan: Plan, folder: Path, blocks: int, device: torch.device, on_event: OnEvent = ignore) -> Run:
    """What `llmq quantize --method gptq` runs, on random weights and tokens."""
    dtype, settings = activation_dtype(device), QuantConfig(method="gptq")
    model = random_model.on_meta(random_model.configuration(plan.llama, blocks), dtype, device)
    tensors = random_model.RandomTensors(model, device)
    skeleton = Skeleton(model, ModelWeights(model, tensors.read, tensors.__contains__), device)
    linears = {path: linear for block in skeleton.blocks for path, linear in block.linears.items()}
    layout = formats.load(settings.formats[0])
    shapes = [(path, linear.out_features, linear.in_features) for path, linear in linears.items()]
    plans = dict(zip(linears, layer_plans.plan_layers(shapes, settings, layout), strict=True))
    tokens = torch.randint(plan.llama.vocabulary, (plan.windows, plan.tokens))
    text = Text(tokens, max(1, TOKENS_PER_BATCH // plan.tokens))
    stream = Stream(skeleton, text, RecordedCalls(skeleton), Storage(device), to_the_end=False)
    options = algorithms.Options(layout.scale_dtype(dtype), settings.order, settings.scales, settings.damping)
    writer = Writer.open(folder / "out", identity={"random": True}, overwrite=True, needed_bytes=0)
    return Run(
        skeleton=skeleton,
        streams=Streams(stream, memory=_memory(device)),
        tuning=None,
        plans=plans,
        method=settings.stages,
        options=options,
        layout=layout,
        reader=lambda name: None,
        writer=writer,
        on_event=on_event,
    )


def _memory(device: torch.device) -> int:
    """Bytes of activations that may be held, by the rule of `llmq quantize`."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
