"""From a model's name to a finished folder: everything around `pipeline.py`.

Creating a `Job` checks the request (`run_plan.py`): it raises for every problem that is visible in the settings, the
configuration and the headers of the checkpoint. `Job.run` then quantizes the model, calls `on_event`, and fills in
`Job.report`. Texts are read and checked in `Job.run`, before the first block.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmq import memory, pipeline
from llmq._version import __version__
from llmq.calibration import CalibrationSet
from llmq.calibration.documents import Contents
from llmq.checkpoint.sealed import sha256_of
from llmq.checkpoint.staging import STAGING, Staging
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig
from llmq.distributed.following import agree_on_blocks, shared_writer
from llmq.distributed.ranks import ALONE, Ranks
from llmq.errors import ConfigError
from llmq.export import save, verdict
from llmq.export.finished import finished_record, finished_report
from llmq.memory import Economy
from llmq.methods import Method
from llmq.mixed_precision import assign, sensitivity
from llmq.mixed_precision.sensitivity import Question
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Text
from llmq.numerics.scheme import WeightScheme
from llmq.report.events import Event, OnEvent, ignore
from llmq.report.pages import LiveReport
from llmq.report.record import BlockReport, Report
from llmq.report.sensitivity import Sensitivity
from llmq.report.timeline import Timeline
from llmq.run_plan import Plan
from llmq.run_text import RunText, sequences_at_once
from llmq.runtime.environment import versions
from llmq.schedule import possible
from llmq.schedule import stages as expected
from llmq.setting_fields import config_to
from llmq.source_names import parse_sources
from llmq.steps import fisher_information, float_probe, lm_head, output_layout
from llmq.steps.fisher_information import FisherInformation
from llmq.steps.run import Run, streams_of


class Job:
    """One request to quantize a model; `plan` has the scheme of each linear layer of the blocks.

    `stages` replace the stages of `settings.method`, for experiments. `ranks` are the processes that run the same job.
    `given` are the contents of sources of calibration text that are not read from a file or the Hub.
    """

    def __init__(
        self,
        model: str | Path,
        out: str | Path | None = None,
        settings: QuantConfig | None = None,
        *,
        stages: Method | None = None,
        device: str = "auto",
        revision: str | None = None,
        overwrite: bool = False,
        trust_remote_code: bool = False,
        ranks: Ranks = ALONE,
        given: Mapping[str, Contents] | None = None,
    ) -> None:
        settings = settings or QuantConfig()
        self._overwrite, self._ranks, device = overwrite, ranks, ranks.device(device)
        self.plan = Plan.make(model, settings, stages, device=device, revision=revision, remote_code=trust_remote_code)
        if settings.target_bits is not None:
            self._question()  # raises ConfigError for a target that no choice of grids can reach
        self.out = Path(out) if out is not None else output_layout.default_output(str(model), self.plan.settings)
        output_layout.require_folder_name(self.out)
        several = len(settings.formats) > 1
        self._folders = [self.out / name for name in settings.formats] if several else [self.out]
        if self.plan.checkpoint.folder.resolve() in [folder.resolve() for folder in (self.out, *self._folders)]:
            raise ConfigError(
                f"the output folder {self.plan.checkpoint.folder} is the model itself, which is not overwritten",
                hint="give another output folder",
            )
        model_id = self.plan.checkpoint.fingerprint()
        self._text = RunText(self.out / STAGING, model_id, remote_code=trust_remote_code, given=given)
        self.report = Report(
            source=str(model),
            output=str(self.out),
            settings=config_to(self.plan.settings),
            versions={**versions(), "device": str(self.plan.device), "processes": str(ranks.size)},
            left=self.plan.left(),
            original_bytes=self.plan.checkpoint.nbytes,
            request=sha256_of(self._identity()),
        )
        self._fisher: FisherInformation | None = None  # measured once for all attempts
        self._timeline = Timeline()
        self.finished = False  # whether `run` found the finished model of an earlier run
        self.report.notes += [*self.plan.notes, *self.plan.idle_patterns()]
        if self.commits > self.blocks and self.plan.stages.tuning is not None:
            self.report.notes.append(lm_head.FLOAT_HEAD)

    @property
    def blocks(self) -> int:
        return len(self.plan.skeleton.blocks)

    @property
    def commits(self) -> int:
        """The number of `BlockReport`s of a run: one per block, and one for the head if it is quantized."""
        head = self.plan.layers.get(self.plan.skeleton.head_path or "")
        return self.blocks + (head is not None and head.scheme.weights is not None)

    def run(self, on_event: OnEvent = ignore) -> Report:
        """Quantize the model, and call `on_event` for every event. The finished folder appears at the end.

        If the output folder holds the model of the same request already, its report is returned.
        """
        start = time.monotonic()
        if not self._overwrite:
            finished = self._ranks.first(self._finished)
            if finished is not None:
                self.finished, self.report = True, finished
                self._judge(None, on_event)  # if it was killed before the end of the measurement
                return finished
            if self._ranks.is_first:
                self._require_possible()  # checked before the text is read
        if on_event is not ignore and self._ranks.is_first:
            on_event = self._timeline.before(on_event)
            on_event(expected.planned(self.plan, self._ranks.size))
        self.report.notes += self.plan.grid_notes
        needed = self.plan.stages.needs_calibration or self.plan.settings.target_bits is not None
        load = partial(self._text.load, self.plan, self.report, on_event)
        calibration_set = self._ranks.first(load) if needed else None
        if self._overwrite or not self._ranks.first(lambda: Staging(self.out).blocks()):  # it passed before a block
            self._check_floats(on_event)
        if calibration_set is not None and self.plan.settings.target_bits is not None:
            self._assign_bits(calibration_set, self.plan.settings.target_bits, on_event)
        text = None
        if calibration_set is not None:
            complete = partial(self._text.complete, calibration_set.windows, self.plan, self.report, on_event)
            text = self._ranks.first(complete).share(self._ranks)
        writer = shared_writer(self._ranks, self.out, lambda: self._open_writer(calibration_set, text))
        notes = tuple(self.report.notes)
        attempts = memory.Attempts(self.plan.device, self.report.notes.append, self._ranks.try_again)
        try:
            self._text.save()
            for economy in attempts:
                with attempts.within_memory():
                    self._forget_attempt(notes)
                    agree_on_blocks(self._ranks, writer)
                    run = partial(self.prepare, text, writer, on_event, economy)  # no name keeps its hidden states
                    pipeline.quantize_model(run(), lambda run: save.finish(run, self.plan, self.report, start))
        except BaseException:
            writer.abandon()
            raise
        self._judge(calibration_set, on_event)
        return self.report

    @property
    def bytes_to_write(self) -> int:
        """The size of the models that `run` will add to the disk."""
        if finished_record(self._folders, self.report.request) is not None:
            return 0
        return len(self._folders) * self.plan.expected_bytes

    def require_possible(self, before: int = 0) -> None:
        """Raise an LlmqError if `run` would refuse the output folder, the memory or the disk.

        A folder with a model of the same request is left to `run`, which compares the text.  Other jobs will write
        `before` bytes first.
        """
        if not self._overwrite and finished_record(self._folders, self.report.request) is None:
            self._require_possible(before)

    def _require_possible(self, before: int = 0) -> None:
        Writer.require_free(self.out)
        possible.require(self.plan, self.out, copies=save.copies(self.plan.settings.formats), before=before)

    def _judge(self, text: CalibrationSet | None, on_event: OnEvent) -> None:
        """Measure the finished model, unless this was done or is turned off, and complete its record."""
        report, wanted = self.report, self.report.verdict is None and self.plan.settings.calibration.held_back
        if not self._ranks.is_first or (self.finished and not wanted):
            return
        if wanted:
            held_back = self._text.held_back(self.plan, text, report)
            report.verdict = verdict.judge(self.plan, report, self._folders, held_back, on_event)
        report.forecast = self._timeline.forecast or report.forecast
        verdict.record(report, self._folders)

    def _check_floats(self, on_event: OnEvent) -> None:
        """Run the float model on a few tokens."""
        outside, length = self.plan.outside(), self.plan.settings.calibration.seqlen
        check = partial(float_probe.check, self.plan.skeleton, self.plan.checkpoint, outside, length, on_event)
        self.report.notes += self._ranks.first(check)

    def _forget_attempt(self, notes: Sequence[str]) -> None:
        """Leave the `notes` of before the first attempt, and those about attempts, in the report."""
        attempts = [note for note in self.report.notes if note.startswith(memory.RETRIED)]
        self.report.notes[:] = [*notes, *attempts]
        self.report.blocks = []

    def _identity(self) -> dict[str, Any]:
        """What decides about the bytes of the model, except the contents of the text."""
        plan = self.plan
        return {
            "llmq": __version__,
            "torch": torch.__version__,
            "source": plan.checkpoint.fingerprint(),
            "settings": config_to(plan.settings.without_validation()),
            "stages": dataclasses.asdict(plan.stages),
            "device": plan.device.type,
            **({"importance": plan.importance.sha256} if plan.importance else {}),
        }

    def _finished(self) -> Report | None:
        """The report of the model in the output folder, if the same request with the same text made it."""
        report = dataclasses.replace(self.report, notes=[])
        written = any(source.is_self for source in parse_sources(self.plan.settings.calibration.sources))
        text = None if written else lambda: self._text.load(self.plan, report, ignore).sha256
        return finished_report(self.out, self._folders, self.report.request, text)

    def measure_layers(
        self, tried: Sequence[WeightScheme] = (), windows: int = sensitivity.WINDOWS, on_event: OnEvent = ignore
    ) -> Sensitivity:
        """The error of each layer on each of the grids `tried`; by default the grids of --target-bits."""
        question = self._question(tried)
        if on_event is not ignore:
            on_event(expected.planned_measuring(self.plan, len(question.grids), windows))
        self._check_floats(on_event)
        return self._measured(self._text.load(self.plan, self.report, on_event), question, windows, on_event)

    def _measured(self, text: CalibrationSet, question: Question, windows: int, on_event: OnEvent) -> Sensitivity:
        batch = sequences_at_once(text.windows, self.plan.device)
        measure = partial(sensitivity.measure, self.plan.skeleton, text.windows, question, on_event=on_event)
        return self._ranks.first(lambda: measure(batch=batch, judged=windows))

    def _question(self, tried: Sequence[WeightScheme] = ()) -> Question:
        plan = self.plan
        return assign.ask(
            plan.skeleton, plan.checkpoint, plan.settings, plan.stages.rounding, plan.layout, plan.options, tried
        )

    def _assign_bits(self, text: CalibrationSet, target: float, on_event: OnEvent) -> None:
        """Measure which layers need more bits, and add the result to the settings as overrides."""
        measured = self._measured(text, self._question(), sensitivity.WINDOWS, on_event)
        assignment = assign.spend(measured, target)
        self.plan = self.plan.with_settings(assign.settled(self.plan.settings, assignment))
        self.report.settings, self.report.left = config_to(self.plan.settings), self.plan.left()
        self.report.notes += [*measured.notes, str(assignment)]

    def _open_writer(self, calibration_set: CalibrationSet | None, text: Text | None) -> Writer:
        identity, needed = self._identity(), save.needed_bytes(self.plan, text)
        identity["settings"] |= {"calibration": calibration_set.sha256 if calibration_set else None}
        writer = Writer.open(self.out, identity=identity, overwrite=self._overwrite, needed_bytes=needed)
        self.report.notes += writer.notes(self.commits)
        return writer

    def prepare(self, text: Text | None, writer: Writer, on_event: OnEvent, economy: Economy) -> Run:
        """Everything that is the same for all blocks."""

        def collect(event: Event) -> None:
            self.report.take(event)
            if isinstance(event, BlockReport):
                live.renew()
            on_event(event)

        live = LiveReport(writer.report_page if self._ranks.is_first else None, self.report, self.commits)
        plan, streams = self.plan, None
        if text is not None:
            calls = RecordedCalls(plan.skeleton)
            if not self._ranks.least(self._fisher is not None):  # an attempt may have ended on some ranks only
                self._fisher = self._measured_fisher(text, writer, calls, on_event, economy)
            if self._fisher is not None and self._fisher.overflowed:
                self.report.notes.append(fisher_information.OVERFLOWED.format(", ".join(self._fisher.overflowed)))
            streams = streams_of(
                plan.skeleton, text, calls, plan.stages, folder=writer.activations, fisher=self._fisher,
                economy=economy, quantize_head=plan.settings.quantize_head, ranks=self._ranks,
            )  # fmt: skip
        return Run(
            skeleton=plan.skeleton, streams=streams, seed=plan.settings.seed, fisher=self._fisher,
            plans=dict(plan.layers), method=plan.stages, options=plan.options, layout=plan.layout,
            reader=plan.layout.read_config(plan.quantization_config()), writer=writer, on_event=collect,
            keep_grid=plan.settings.keep_grid, ranks=self._ranks, economy=economy, importance=plan.importance,
        )  # fmt: skip

    def _measured_fisher(
        self, text: Text, writer: Writer, calls: RecordedCalls, on_event: OnEvent, economy: Economy
    ) -> FisherInformation | None:
        if not self.plan.stages.needs_fisher or all(writer.has(index) for index in range(self.blocks)):
            return None
        tokens, seed, folder = (text.whole or text).tokens, self.plan.settings.seed, writer.activations
        return fisher_information.measure(
            self.plan.skeleton, tokens, seed, calls, folder, on_event, self._ranks, text.numbers, economy
        )
