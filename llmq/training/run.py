"""`llmq train`: from a model and a text to a trained, measured folder.

    model ──► quantized, unless it is already (the start) ──► prepared ──► trained ──► packed ──► measured ──► saved

The start and the trained files are measured on the held-out text. If the trained files are worse, the output is the
start, with a note. An interrupted training continues after its last checkpoint, with the same bytes.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq._quantize import quantize
from llmq._version import __version__
from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.sealed import sha256_of
from llmq.checkpoint.staging import Staging
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.evaluation.runs import Run, run_alone, run_compared
from llmq.evaluation.streaming import Source, open_source
from llmq.evaluation.summary import summary, summary_of_original
from llmq.export.finished import finished_record, require_unchanged
from llmq.export.verdict import unmeasured
from llmq.report.events import TUNING, OnEvent, Planned, ignore
from llmq.report.training import Losses, Quality, TrainingReport
from llmq.report.verdict import Verdict, sentence
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.load import choose_device, load_model, load_tokenizer, stored_dtype
from llmq.setting_fields import config_to
from llmq.training import rewritten
from llmq.training.loop import Loop, accelerator_for, require_tracker
from llmq.training.prepare import origin_of, prepared
from llmq.training.settings import TrainingSettings
from llmq.training.state import States
from llmq.training.text import TrainingText, read

CHECKPOINT_BYTES = 13  # per trained value: its code, v, and two moments of Adam
NO_ORIGINAL = "give the float model, or train with the loss cross-entropy, which needs none"


class Training:
    """One training: creating it checks the request and reads the text, `run` does the work.

    model     a quantized model (folder or Hub id), or a float model, which is quantized first with `start` settings
    original  the float model of a quantized one; needed for the loss "kl"
    finished  whether an equal training had written the output before
    """

    def __init__(
        self,
        model: str | Path,
        out: str | Path,
        data: Sequence[str],
        *,
        original: str | Path | None = None,
        settings: TrainingSettings | None = None,
        start: QuantConfig | None = None,
        device: str = "auto",
        tracker: str | None = None,
        overwrite: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._settings = settings or TrainingSettings()
        self._source, self._out, self._overwrite = str(model), Path(out), overwrite
        self._remote_code, self._tracker, self.finished = trust_remote_code, tracker, False
        self._device = choose_device(device)
        self._notes: tuple[str, ...] = ()
        if tracker is not None:
            require_tracker(tracker)
        self._folder = hub.locate(str(model), remote_code=trust_remote_code)
        checkpoint = Checkpoint.open(self._folder)
        self._is_quantized = quantization_settings(checkpoint) is not None
        if self._is_quantized and start is not None:
            raise ConfigError(f"{model} is quantized already", hint="leave out the settings of the start")
        if not self._is_quantized and original is not None:
            raise ConfigError(f"{model} is a float model, so it is the original", hint="leave out the original")
        if self._is_quantized and original is None and self._settings.loss == "kl":
            raise ConfigError("the loss kl needs the original to compare with", hint=NO_ORIGINAL)
        self._start = _with_text(start or QuantConfig(method="best"), data, self._settings)
        self._original = hub.locate(str(original), remote_code=trust_remote_code) if original else None
        if not self._is_quantized:
            self._original = self._folder
        if self._out.resolve() in (self._folder.resolve(), self._original and self._original.resolve()):
            raise ConfigError(f"{out} is a source, which is never changed", hint="give another output folder")
        self._text = self._read(data, checkpoint)
        originals = None if self._original is None else Checkpoint.open(self._original).fingerprint()
        self._identity = {
            "llmq": __version__, "torch": torch.__version__, "source": checkpoint.fingerprint(), "original": originals,
            "training": config_to(self._settings), "text": self._text.sha256, "device": self._device.type,
            "start": None if self._is_quantized else config_to(self._start),
        }  # fmt: skip

    def _read(self, data: Sequence[str], checkpoint: Checkpoint) -> TrainingText:
        settings = self._settings
        inner = checkpoint.config.get("text_config")
        config: Mapping[str, Any] = inner if isinstance(inner, dict) else checkpoint.config
        known = config.get("max_position_embeddings")
        length = min(settings.sequence_length, known) if isinstance(known, int) else settings.sequence_length
        vocabulary = config.get("vocab_size")
        return read(
            data, load_tokenizer(self._folder, remote_code=self._remote_code), length,
            vocabulary=vocabulary if isinstance(vocabulary, int) else 2**31,
            drawn=settings.steps * settings.batch_size, held_out=settings.held_out, seed=settings.seed,
        )  # fmt: skip

    def run(self, on_event: OnEvent = ignore) -> TrainingReport | None:
        """Train, measure and write; of several processes the first returns the report, the others None."""
        accelerator = accelerator_for(self._settings, self._device, self._tracker, self._out.absolute().parent)
        self._settings.require_divisible(accelerator.num_processes)
        if not self._is_quantized and accelerator.num_processes > 1:
            raise ConfigError(
                f"{self._source} is not quantized, and {accelerator.num_processes} processes train",
                hint="quantize it first with llmq quantize, then train the quantized model with --original",
            )
        request = sha256_of(self._identity)
        if not self._overwrite and (record := finished_record([self._out], request)) is not None:
            require_unchanged(self._out, [self._out])
            self.finished = True
            return TrainingReport.from_dict(record["training"])
        on_event(Planned({TUNING: 1.0}))
        if not accelerator.is_main_process:
            accelerator.wait_for_everyone()  # until the first process has the staging folder
            self._loop(accelerator, Staging(self._out).training, ignore)
            return None
        writer = Writer.open(
            self._out, identity=self._identity, overwrite=self._overwrite, needed_bytes=self._needed_bytes()
        )
        try:
            accelerator.wait_for_everyone()
            return self._finished(writer, accelerator, request, on_event)
        except BaseException:
            writer.abandon()
            raise

    def _needed_bytes(self) -> int:
        """Disk space: the start, the trained tensors and the result, and two checkpoints."""
        checkpoint = Checkpoint.open(self._folder)
        values = checkpoint.nbytes // stored_dtype(checkpoint).itemsize  # of a float model
        if self._is_quantized:
            packed = PackedWeights(checkpoint)
            values = sum(math.prod(packed.shape(module)) for module in packed.modules)
        return 3 * checkpoint.nbytes + 2 * CHECKPOINT_BYTES * values

    def _loop(self, accelerator: Any, place: Path, on_event: OnEvent) -> tuple[Path, Any, list[Losses]]:
        """The folder of the start, the trained model, and its losses; `place` is for the start and for checkpoints."""
        if self._tracker:
            accelerator.init_trackers("llmq", config={**config_to(self._settings), "model": self._source})
        teacher = None
        if self._original is not None:
            dtype = torch.float32 if self._device.type == "cpu" else stored_dtype(Checkpoint.open(self._original))
            teacher = load_model(self._original, device="cpu", dtype=dtype, trust_remote_code=self._remote_code)
        start, states = self._quantized(place), States(place)
        student = prepared(start, teacher, remote_code=self._remote_code)
        if self._settings.loss != "kl":
            teacher = None
        losses = Loop(accelerator, student, teacher, self._text, self._settings, states, on_event).run()
        self._notes = (*self._text.notes, *states.notes, *origin_of(student).notes)
        return start, student, losses

    def _quantized(self, place: Path) -> Path:
        """The folder of the quantized model that the training starts from; a float model is quantized first."""
        if self._is_quantized:
            return self._folder
        quantize(
            self._source, place / "start", config=self._start, device=str(self._device), progress=False,
            trust_remote_code=self._remote_code,
        )  # fmt: skip
        return place / "start"

    def _finished(self, writer: Writer, accelerator: Any, request: str, on_event: OnEvent) -> TrainingReport:
        begun = time.monotonic()
        writer.training.mkdir(parents=True, exist_ok=True)
        start, student, history = self._loop(accelerator, writer.training, on_event)
        student = student.to("cpu")
        moved = rewritten.commit(writer, student)
        with writer.finishing() as final:
            rewritten.assemble(writer, final, student)
            del student
            before, after, verdict = self._measured(start, final)
            kept = _not_worse(before, after, self._settings.loss)
            report = TrainingReport(
                source=self._source, output=str(self._out), start=self._source, text=self._text.about(),
                original=None if self._original is None else str(self._original), settings=config_to(self._settings),
                history=tuple(history), moved=moved, before=before, after=after, kept=kept,
                seconds=time.monotonic() - begun, notes=self._notes,
            )  # fmt: skip
            changes: dict[str, Any] = {"training": report.to_dict(), "request": request, "output": str(self._out)}
            if kept:
                changes["verdict"] = dataclasses.asdict(verdict)
            else:
                rewritten.replace_by_start(final, start)
            rewritten.record(final, start, changes, [report.sentence])
        return report

    def _measured(self, start: Path, final: Path) -> tuple[Quality, Quality, Verdict]:
        """The quality of the start and of the trained files on the held-out text, and the verdict on the latter."""
        windows = self._text.held_out
        if self._original is None:
            before, after = (_quality(run_alone(self._opened(folder), windows)) for folder in (start, final))
            return before, after, unmeasured("there is no original to compare with")
        runs = run_compared(
            self._opened(self._original), [partial(self._opened, folder) for folder in (start, final)], windows
        )
        before, after = map(_quality, runs)
        return before, after, _verdict(runs[1], after, windows)

    def _opened(self, folder: Path) -> Source:
        return open_source(folder, self._device, remote_code=self._remote_code)


def _with_text(start: QuantConfig, data: Sequence[str], settings: TrainingSettings) -> QuantConfig:
    """The settings of the start, calibrated on the text of the training unless they name another; one format."""
    if len(start.formats) > 1 or start.formats[0].startswith("gguf"):
        raise ConfigError(
            f"the format is {start.format!r}, expected one safetensors format",
            hint="convert the trained model: llmq convert OUT OUT-gguf --to gguf",
        )
    text = start.calibration
    if not text.sources:
        length = min(text.seqlen, settings.sequence_length)
        text = text.replace(sources=tuple(data), seqlen=length, validation=0)
    return start.replace(calibration=text)


def _quality(run: Run) -> Quality:
    figures = summary(run.scores)
    return Quality(figures.perplexity, figures.kl_mean, figures.same_top_1)


def _not_worse(before: Quality, after: Quality, loss: str) -> bool:
    if loss == "kl" and before.kl is not None and after.kl is not None:
        return after.kl <= before.kl
    return after.perplexity <= before.perplexity


def _verdict(run: Run, quality: Quality, windows: Tensor) -> Verdict:
    figures, original = summary(run.scores), summary_of_original(run.scores)
    assert quality.kl is not None and quality.same_top1 is not None and original is not None
    return Verdict(
        sentence(quality.kl, quality.same_top1, None, None, is_rtn=False), kl=quality.kl,
        kl_interval=figures.kl_mean_interval, perplexity_float=original.perplexity, perplexity=quality.perplexity,
        same_top1=quality.same_top1, tokens=windows.numel(),
        text=f"{len(windows)} sequences of {windows.shape[1]} tokens on which nothing was trained",
    )  # fmt: skip
