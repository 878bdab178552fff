"""Quantizing a model with the dimensions of Llama 3.1 8B, step by step, by the pipeline of llmq.

Weights and text are random, made on the device when they are read, so the figures do not include loading; saving is
shown separately.  For gptq, fast and balanced a few blocks are run with every step timed, and their seconds are
extrapolated to the whole model, which the record states.  A few steps of end-to-end tuning follow; then, if there is
time, the whole model is quantized by gptq without the stopwatch.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import gptq_steps, random_run
from bench.plan import Plan
from bench.session import Result, Session
from bench.stopwatch import Stopwatch, watching
from bench.timing import now
from llmq import pipeline
from llmq.config import QuantConfig
from llmq.methods import Method
from llmq.model.passes.forward import forward
from llmq.report.events import Event
from llmq.report.record import BlockReport, TuningReport
from llmq.steps.end_to_end import tune_end_to_end

# (label, function whose time it gets).  A label may have several functions; time in none of them goes to `rest`.
STEPS = (
    ("make weights", "llmq.model.build.block:Block.load"),
    ("forward", "llmq.model.build.block:Block.run"),
    ("hessian", "llmq.numerics.input_stats:InputStats.update"),
    ("factorize", "llmq.steps.round_group:factorize"),
    ("search scales", "llmq.numerics.affine_grid:fit_searched"),
    ("round", "llmq.algorithms.gptq:compensate"),
    ("compare with nearest", "llmq.algorithms.gptq:without_worse_rows"),
    ("target", "llmq.algorithms.target:choose"),
    ("descent", "llmq.algorithms.descent:refine"),
    ("tune block", "llmq.steps.block_tuning:tune"),
    ("judge", "llmq.algorithms.validation_loss:ValidationLoss.of"),
    ("report", "llmq.pipeline:layer_report"),
    ("save", "llmq.checkpoint.writer:Writer.commit"),
)
NOT_COUNTED = ("make weights", "save")
# Seconds for the whole of Llama 3.1 8B, 128 x 2048 tokens, on one H200 (790 TFLOP/s bf16, 4.3 TB/s): arithmetic.
# `round` is the block kernel, 0.4, and the products for the columns after a block, 1.0; `gptq_steps` times both.
FLOORS = {"forward": 11.5, "hessian": 3.3, "factorize": 2.0, "round": 1.4}
PACK = "pack"
TUNING_STEPS = (
    ("step", "llmq.steps.end_to_end.session:Session._descend"),
    ("validate", "llmq.steps.end_to_end.session:Session._validate"),
    ("adopt", "llmq.steps.end_to_end.session:Session.adopt"),
)
TARGET_SECONDS = 60.0
MARGIN = 1.2  # of the expected time must be left before the whole model is started


def measure(plan: Plan, session: Session) -> None:
    """Cases: few blocks METHOD, tuning, those of `gptq_steps`, whole model."""
    device = torch.device(plan.device)
    few = session.run("few blocks gptq", partial(few_blocks, plan, session, device, "gptq"))
    for method in ("fast", "balanced"):
        session.run(f"few blocks {method}", partial(few_blocks, plan, session, device, method))
    session.run("tuning", partial(few_steps, plan, device))
    gptq_steps.measure(plan, session)
    if few is not None:
        session.run("whole model", partial(whole_model, plan, session, device), needs=MARGIN * few["expected_seconds"])


def few_blocks(plan: Plan, session: Session, device: torch.device, method: str) -> Result:
    """Every step on a few blocks, without the first, a warm-up, and the last, which no forward follows.

    Fisher information, where the method needs it, is measured on these blocks before the first, and shown separately.
    """
    stopwatch, stages = Stopwatch(partial(now, device)), QuantConfig(method=method).stages
    with tempfile.TemporaryDirectory() as folder:
        blocks: list[Mapping[str, float]] = []

        def note(event: Event) -> None:
            if isinstance(event, BlockReport):
                blocks.append(stopwatch.taken())
                session.report(f"{method}: block {len(blocks)} of {plan.few_blocks}, {sum(blocks[-1].values()):.2f} s")

        begun = now(device)
        run = random_run.prepare(plan, Path(folder), plan.few_blocks, device, replace(stages, tuning=None), note)
        prepared = now(device) - begun
        points = (*STEPS, (PACK, "llmq.formats.codecs.bit_packing:pack"))
        with watching(stopwatch, points) as missing:
            forward(run.skeleton, partial(pipeline.quantize_block, run))
            run.writer.settle()
    counted = blocks[1:-1] or blocks[-1:]
    times = plan.llama.blocks / len(counted)
    labels = sorted({label for block in counted for label in block})
    steps = {label: times * sum(block.get(label, 0.0) for block in counted) for label in labels}
    total = sum(seconds for label, seconds in steps.items() if label not in NOT_COUNTED)
    floors = FLOORS if plan.name == "full" and method == "gptq" else {}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "method": method, "extrapolated": True, "blocks": len(blocks), "counted_blocks": len(counted),
        "of_blocks": plan.llama.blocks, "tokens": plan.windows * plan.tokens, "steps": steps, "floors": floors,
        "first_block": dict(blocks[0]), "not_watched": missing, "seconds": total,
        "expected_seconds": sum(steps.values()), "peak_memory_bytes": peak,
        "preparation_seconds": prepared if stages.needs_fisher else None,
        "summary": f"{total:.1f} s for {plan.llama.blocks} blocks, extrapolated from {len(counted)}",
    }  # fmt: skip


def few_steps(plan: Plan, device: torch.device) -> Result:
    """Seconds per step and memory of end-to-end tuning over `plan.tuned_blocks` blocks, on a part of the text."""
    stages = QuantConfig(method="best").stages
    assert stages.tuning is not None
    short = replace(stages.tuning, steps=plan.tuning_steps, tokens_per_weight=0.0)
    reports: list[TuningReport] = []

    def note(event: Event) -> None:
        if isinstance(event, TuningReport):
            reports.append(event)

    with tempfile.TemporaryDirectory() as folder:
        method: Method = replace(
            stages, token_weights=False, refinements=(), block_tuning=None, written=0, tuning=short
        )
        some = replace(plan, windows=min(plan.windows, 16))
        run = random_run.prepare(some, Path(folder), plan.tuned_blocks, device, method, note)
        forward(run.skeleton, partial(pipeline.quantize_block, run))
        run.writer.settle()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        stopwatch = Stopwatch(partial(now, device))
        with watching(stopwatch, TUNING_STEPS) as missing:
            tune_end_to_end(run)
    steps = {label: seconds for label, seconds in stopwatch.taken().items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    per_step = steps.get("step", 0.0) / max(1, plan.tuning_steps)
    return {
        "blocks": plan.tuned_blocks, "steps": plan.tuning_steps, "tokens_per_step": short.tokens, "seconds": steps,
        "not_watched": missing, "peak_memory_bytes": peak, "notes": [str(note) for r in reports for note in r.notes],
        "step_seconds": per_step, "wrong": not reports,
        "summary": f"{per_step:.2f} s per step of {plan.tuned_blocks} blocks, {short.tokens} tokens",
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

        run = random_run.prepare(plan, Path(folder), plan.llama.blocks, device, QuantConfig(method="gptq").stages, note)
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
