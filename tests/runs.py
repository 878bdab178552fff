"""Complete runs on tiny models, and checks of their results with only transformers and safetensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq.calibration import CalibrationSet
from llmq.checkpoint import PAGE_FILES, PROVENANCE_FILE
from llmq.config import QuantConfig
from llmq.distributed.ranks import ALONE, Ranks
from llmq.job import Job
from llmq.methods import Method
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import run_through
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.streams import Text
from llmq.report.events import Event, OnEvent, ignore
from llmq.report.record import BlockReport, LayerReport
from llmq.setting_fields import merged

WINDOWS: dict[str, Any] = {"samples": 4, "seqlen": 48}
TIMED = (PROVENANCE_FILE, *PAGE_FILES)
QUICK: dict[str, Any] = {"group_size": 16, "scales": "minmax", "validate": 0, **WINDOWS}


def quantize(model: Path, out: Path, text: Path, **settings: Any) -> llmq.Report:
    """A run on the CPU, by default with the settings `QUICK`."""
    return llmq.quantize(str(model), out, device="cpu", **{**QUICK, "calibration": [text], **settings})


def job(
    model: Path, out: Path, text: Path, *, stages: Method | None = None, ranks: Ranks = ALONE, **settings: Any
) -> Job:
    """A job with the same settings, not started."""
    asked = merged(QuantConfig(), {**QUICK, "calibration": [text], **settings})
    return Job(str(model), out, asked, stages=stages, device="cpu", ranks=ranks)


def read_text(job: Job) -> CalibrationSet:
    """The calibration text that a job reads."""
    return job._text.load(job.plan, job.report, ignore)


def windows_of(model: Path, text: Path, **settings: Any) -> Tensor:
    """The token ids (S, T) that a run with these settings reads."""
    return read_text(job(model, model / "nowhere", text, **settings)).windows


class Stopped(Exception):  # noqa: N818  (not an error)
    """Stops a run in the middle."""


def stop(run: Callable[[OnEvent], object], enough: Callable[[Event], bool]) -> list[Event]:
    """Start a run, stop it at the first event for which `enough` is true, and return the events so far."""
    events: list[Event] = []

    def record(event: Event) -> None:
        events.append(event)
        if enough(event):
            raise Stopped

    try:
        run(record)
    except Stopped:
        return events
    raise AssertionError("the run ended before it could be stopped")


def stop_in_block(job: Job, blocks: int) -> list[Event]:
    """Start a run, and stop it after `blocks` blocks and one layer of the next block."""
    finished = 0

    def enough(event: Event) -> bool:
        nonlocal finished
        finished += isinstance(event, BlockReport)
        return finished == blocks and isinstance(event, LayerReport)

    return stop(job.run, enough)


@torch.no_grad()
def streamed_logits(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """(B, T, V) for `tokens` (B, T), of a model that is read block by block."""
    passed = run_through(skeleton, Text(tokens, len(tokens)), Storage(skeleton.device))
    return skeleton.logits(tokens, passed.last(range(len(tokens))))


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a folder except the record and the report, which contain times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def weights(folder: Path) -> dict[str, Tensor]:
    """Every quantized weight of a folder or a .gguf file as floats."""
    return dict(llmq.dequantize(folder))


def assert_same_weights(actual: Path, expected: Path) -> None:
    """The quantized weights are equal bit for bit, and there is at least one."""
    ours, theirs = weights(actual), weights(expected)
    assert ours.keys() == theirs.keys() and ours
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def float_equivalent(out: Path, model: Path) -> dict[str, Tensor]:
    """The tensors of a quantized checkpoint by their names in `model`, with packed weights dequantized to float32."""
    kept = {name: tensor for name, tensor in tensors_of(out).items() if name in tensors_of(model)}
    return {**kept, **dict(llmq.dequantize(out))}


def float_model(folder: Path, weights: dict[str, Tensor]) -> Any:
    """The float model in `folder` with some of its weights replaced, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    return model


def logits(model: Any, windows: Tensor) -> Tensor:
    """The logits (S, T, V) of a transformers model."""
    with torch.no_grad():
        result: Tensor = model(input_ids=windows, use_cache=False).logits
    return result


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖"""
    return float((actual - expected).norm() / expected.norm())
