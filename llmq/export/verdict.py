"""Measure a finished model on text that calibration did not use, and add the verdict to its record.

The finished folder is opened and read block by block, as any loader would read it. The same text goes through the
original, and through the original with each weight rounded to nearest (RTN) on the same grid when its block is read;
nothing is written for this. `report/verdict.py` has the rule for the sentence.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq.algorithms import rtn
from llmq.checkpoint.index import gguf_file
from llmq.checkpoint.reader import Checkpoint
from llmq.config import QuantConfig
from llmq.errors import BackendError, UnsupportedModelError
from llmq.evaluation.bootstrap import Bootstrap, Interval, interval_of_ratio
from llmq.evaluation.runs import SPARE_PART, Run, run_compared
from llmq.evaluation.streaming import Streamed
from llmq.evaluation.summary import summary, summary_of_original
from llmq.evaluation.trajectories import LENGTH, PROMPT
from llmq.export import card
from llmq.gguf import reader
from llmq.memory import is_out_of_memory, spare
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import loaded
from llmq.report.events import CONTINUING, FINISHED, NEAREST, ORIGINAL, OnEvent, Progress
from llmq.report.record import Report
from llmq.report.stored_record import read_record, write_record
from llmq.report.verdict import Continuation, Verdict, sentence
from llmq.run_plan import Plan
from llmq.run_text import HeldBack
from llmq.runtime.load import load_tokenizer, stored_dtype
from llmq.runtime.open_skeleton import open_skeleton
from llmq.steps.output_layout import staged_format

PROMPTS = 3  # that both models continue


def judge(plan: Plan, report: Report, folders: Sequence[Path], text: HeldBack, on_event: OnEvent) -> Verdict:
    """Measure the finished model that the run of `report` has made, in one folder per format.

    If it cannot be measured, the verdict has no figures, and its sentence gives the reason.
    """
    start = time.monotonic()
    if text.windows is None:
        return unmeasured(text.about)
    plan = plan.with_settings(QuantConfig.model_validate(report.settings))  # with the grids that --target-bits chose
    measured = _measured_format(plan)
    open_ = _Opener(plan, report, folders[plan.settings.formats.index(measured)], on_event)
    try:
        return dataclasses.replace(_measured(open_, text), measured=measured, seconds=time.monotonic() - start)
    except UnsupportedModelError as error:
        return unmeasured(f"{error}; measure it with llmq eval, which loads such a model as a whole")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BackendError(
            f"out of memory while the finished model was measured: {str(error).partition(chr(10))[0]}",
            hint=f"the model in {open_.folder} is complete; --validate 0 leaves the measurement out",
        ) from error


def record(report: Report, folders: Sequence[Path]) -> None:
    """Add the verdict of `report` to the records and cards of the finished model, in one folder per format.

    The record of the first folder is written last. It decides whether the same command measures the model again.
    """
    known = report.to_dict()
    for folder in reversed(folders):
        measured = {**read_record(folder), "verdict": known["verdict"], "forecast": known["forecast"]}
        card.renew_figures(folder, measured)
        write_record(folder, measured)


def _measured(open_: "_Opener", text: HeldBack) -> Verdict:
    """The figures of the model and of RTN, and continuations."""
    assert text.windows is not None, "there is text"
    is_rtn = not open_.plan.stages.needs_calibration
    has_baseline = not (is_rtn or open_.plan.settings.static_inputs)  # scales are those of smoothed inputs
    models = [open_.quantized, open_.rounded] if has_baseline else [open_.quantized]
    runs = run_compared(open_.original(), models, text.windows, on_event=open_.on_event)
    continuations, notes = _continuations(open_, text.windows)
    noted = dict.fromkeys([*notes, *(note for run in runs for note in run.notes)])
    return dataclasses.replace(
        _verdict(runs, is_rtn=is_rtn), tokens=text.windows.numel(), text=text.about, continuations=continuations,
        notes=tuple(noted),
    )  # fmt: skip


def unmeasured(reason: str) -> Verdict:
    return Verdict(f"The quality was not measured: {reason}.")


def _measured_format(plan: Plan) -> str:
    """The format in which the blocks were staged, if it is one of the run; the others hold the same values."""
    staged = staged_format(plan.settings.formats)
    return staged if staged in plan.settings.formats else plan.settings.formats[0]


@dataclasses.dataclass(frozen=True)
class _Opener:
    """The original, the finished model in `folder`, and the original rounded to nearest, read block by block.

    Each folder is opened once: this takes longer than to run the text through a small model.
    """

    plan: Plan
    report: Report
    folder: Path
    on_event: OnEvent

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.plan.device.type == "cpu" else stored_dtype(self.plan.checkpoint)

    def _skeleton(self, folder: Path) -> Skeleton:
        checkpoint = Checkpoint.open(folder)
        return open_skeleton(checkpoint, self.plan.device, self._dtype, remote_code=self.plan.remote_code)

    @cached_property
    def _original(self) -> Skeleton:
        return self._skeleton(self.plan.checkpoint.folder)

    @cached_property
    def _finished(self) -> Skeleton:
        file = gguf_file(self.folder)
        if file is None:
            return self._skeleton(self.folder)
        return reader.open_skeleton(file, self.plan.device, self._dtype, self.plan.checkpoint.folder)

    def original(self) -> Streamed:
        return Streamed(self._original, name=ORIGINAL, on_event=self.on_event)

    def quantized(self) -> Streamed:
        return Streamed(self._finished, name=FINISHED, on_event=self.on_event)

    def rounded(self) -> Streamed:
        paths, planned = self._rounded_paths(), self.plan.layers
        inputs = {path: plan.scheme.inputs for path, plan in planned.items() if plan.scheme.inputs is not None}
        skeleton, path = self._original, self._original.head_path
        if inputs or path in paths:  # these change more than the weights of a block that was read
            skeleton = self._skeleton(self.plan.checkpoint.folder)
            skeleton.quantize_inputs(inputs)
        if path is not None and path in paths:
            head = skeleton.model.get_submodule(path)
            weight = self._round(path, skeleton.head_weight())
            head.weight = nn.Parameter(weight.to(self._dtype), requires_grad=False)

        @contextmanager
        def ready(block: Block) -> Iterator[None]:
            with loaded(block):
                for name in block.linears.keys() & paths:
                    block.set_weight(name, self._round(name, block.weight(name)))
                yield

        return Streamed(skeleton, name=NEAREST, on_event=self.on_event, ready=ready)

    def _rounded_paths(self) -> set[str]:
        """The layers that the run has rounded; not those that already lay on a grid, which RTN would not change."""
        names = {layer.name for layer in self.report.layers if not layer.existing_grid}
        return {path for path, layer in self.plan.layers.items() if layer.name in names}

    def _round(self, path: str, weight: Tensor) -> Tensor:
        scheme = self.plan.layers[path].scheme.weights
        assert scheme is not None, f"{path} is quantized"
        return rtn.round_weight(weight, None, scheme, self.plan.options).quantized.dequantize()


def _verdict(runs: list[Run], *, is_rtn: bool) -> Verdict:
    """The figures of the first run; a second one is that of RTN."""
    model = summary(runs[0].scores)
    original = summary_of_original(runs[0].scores)
    baseline = summary(runs[1].scores) if len(runs) > 1 else None
    assert model.kl_mean is not None and model.same_top_1 is not None and original is not None
    kl_rtn = model.kl_mean if is_rtn else baseline.kl_mean if baseline is not None else None
    ratio_interval = _ratio_interval(runs) if len(runs) > 1 else None
    return Verdict(
        sentence=sentence(model.kl_mean, model.same_top_1, kl_rtn, ratio_interval, is_rtn=is_rtn),
        kl=model.kl_mean,
        kl_interval=model.kl_mean_interval,
        kl_rtn=kl_rtn,
        rtn_ratio_interval=ratio_interval,
        perplexity_float=original.perplexity,
        perplexity=model.perplexity,
        same_top1=model.same_top_1,
        same_top1_rtn=model.same_top_1 if is_rtn else baseline.same_top_1 if baseline is not None else None,
    )


def _ratio_interval(runs: list[Run]) -> Interval | None:
    """The 95 % interval of the KL of the first run divided by that of the second one; a sequence is a document."""
    ours, theirs = (run.scores.comparison for run in runs)
    assert ours is not None and theirs is not None
    S, T = ours.divergence.shape
    bootstrap = Bootstrap([torch.arange(S)[:, None].expand(S, T)])
    ours_sums, _ = bootstrap.sums(ours.divergence)
    theirs_sums, _ = bootstrap.sums(theirs.divergence)
    return interval_of_ratio(ours_sums, theirs_sums, bootstrap.weights)


def _continuations(open_: _Opener, windows: Tensor) -> tuple[tuple[Continuation, ...], list[str]]:
    """Greedy continuations of the beginnings of the first sequences, if whole models fit into memory, and notes."""
    original = open_.original()
    length = min(PROMPT, windows.shape[1])
    free = spare(original.device)
    if original.whole_bytes > SPARE_PART * free:
        return (), [
            f"no text was generated: a whole model needs {original.whole_bytes / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free"
        ]
    if original.max_tokens is not None and original.max_tokens < length + LENGTH:
        return (), [f"no text was generated: the context of the model has {original.max_tokens} tokens only"]
    tokenizer = load_tokenizer(open_.plan.checkpoint.folder, remote_code=open_.plan.remote_code)
    prompts = windows[:PROMPTS, :length]
    ends = frozenset({tokenizer.eos_token_id} - {None})
    open_.on_event(Progress(CONTINUING, 0, 2, "models"))
    expected = original.continue_greedily(prompts, ends)
    open_.on_event(Progress(CONTINUING, 1, 2, "models"))
    written = open_.quantized().continue_greedily(prompts, ends)
    open_.on_event(Progress(CONTINUING, 2, 2, "models"))
    texts = ([tokenizer.decode(ids, skip_special_tokens=True) for ids in part.tolist()]
             for part in (prompts, expected, written))  # fmt: skip
    return tuple(Continuation(*parts) for parts in zip(*texts, strict=True)), []
