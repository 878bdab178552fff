"""From a model's name to a finished folder: everything around the page in `pipeline.py`.

A `Job` is made of a request; making it raises for whatever can be known to go wrong before hours are spent (`plan.py`).
`run` does the work and yields a record after each layer and block; `report` fills up.
"""

import dataclasses
import itertools
import math
import platform
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llmq import memory, pipeline
from llmq._version import __version__
from llmq.calibration import CalibrationSet
from llmq.checkpoint.staging import STAGING
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig
from llmq.config_files import config_to, merged
from llmq.errors import ConfigError
from llmq.export import save
from llmq.methods import Method
from llmq.mixed_precision import assign, sensitivity
from llmq.mixed_precision.sensitivity import Question
from llmq.model.build.checkpoint_names import require_finite
from llmq.model.passes.hidden_states import Stream
from llmq.model.passes.statistics import TokenWeights
from llmq.numerics.scheme import WeightScheme
from llmq.plan import Plan
from llmq.report import record
from llmq.report.record import BlockReport, ConvertStep, LayerReport, MeasuringStep, Report, TuningStep
from llmq.report.sensitivity import Sensitivity
from llmq.run_text import RunText
from llmq.steps import end_to_end, lm_head, output_layout, token_weights
from llmq.steps.run import Run

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32_768}
FLOAT_HEAD = "the tuning's predictions are those of the float head: what rounding the head costs is not tuned against"


class Job:
    """One request to quantize; `plan` says what is to become of each linear layer of the blocks.

    `stages` take the place of those of `settings.method`: for experiments.
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
    ) -> None:
        asked = settings or QuantConfig()
        self._overwrite = overwrite
        self.plan = Plan.make(model, asked, stages, device=device, revision=revision, remote_code=trust_remote_code)
        if asked.target_bits is not None:
            self._question()  # which says whether there is an answer
        self.out = Path(out) if out is not None else default_output(str(model), asked)
        output_layout.require_folder_name(self.out)
        places = [self.out, *(self.out / name for name in asked.formats if len(asked.formats) > 1)]
        if self.plan.checkpoint.folder.resolve() in [place.resolve() for place in places]:
            raise ConfigError(
                f"{self.plan.checkpoint.folder} is the model itself, which is not overwritten",
                hint="give another output folder",
            )
        model_id = self.plan.checkpoint.fingerprint()
        self._text = RunText(self.out / STAGING, model_id, remote_code=trust_remote_code)
        self.report = Report(
            source=str(model),
            output=str(self.out),
            settings=config_to(asked),
            versions={
                "llmq": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": f"{platform.system()} {platform.machine()}",
                "device": str(self.plan.device),
            },
            left=self.plan.left(),
            original_bytes=self.plan.checkpoint.nbytes,
        )
        self.report.notes += self.plan.idle_patterns()
        if self.commits > self.blocks and self.plan.stages.tuning is not None:
            self.report.notes.append(FLOAT_HEAD)

    @property
    def blocks(self) -> int:
        return len(self.plan.skeleton.blocks)

    @property
    def commits(self) -> int:
        """How many `BlockReport`s a run yields: the head counts as one more block where it is quantized."""
        head = self.plan.layers.get(self.plan.skeleton.head_path or "")
        return self.blocks + (head is not None and head.scheme is not None)

    def run(self) -> Iterator[CalibrationSet | MeasuringStep | LayerReport | BlockReport | TuningStep | ConvertStep]:
        """Do it; yields the text, then a record after each layer and block.  The finished folder appears at the end."""
        start = time.monotonic()
        if not self._overwrite:
            Writer.require_free(self.out)  # known now, and not after the text was read
        for name in self.plan.outside():  # a block's own are looked at when it is read
            require_finite(name, self.plan.checkpoint.tensor(name))
        stages, target = self.plan.stages, self.plan.settings.target_bits
        text = self._calibration_set() if stages.needs_calibration or target is not None else None
        if text is not None:
            yield text
            if target is not None:
                yield from self._spend(text, target)
        writer = self._open_writer(text)
        try:
            self._text.save()
            run = self._pipeline_run(text, writer)
            for done in itertools.chain(pipeline.quantize_blocks(run), lm_head.quantize_head(run)):
                if isinstance(done, BlockReport):
                    self.report.blocks.append(done)
                yield done
            if text is not None and self._text.tuned_on is not None:
                judged = end_to_end.held_out(stages, text.windows)
                self.report.tuning = yield from end_to_end.tune(
                    run, self._text.tuned_on, judged, self.plan.settings.seed
                )
            if run.stream is not None:
                self.report.notes += run.stream.notes
            yield from self._finish(writer, start)
        except BaseException:
            writer.abandon()
            raise

    def measure_layers(
        self, tried: Sequence[WeightScheme] = (), windows: int = sensitivity.WINDOWS
    ) -> Generator[CalibrationSet | MeasuringStep, None, Sensitivity]:
        """What every layer suffers on each of the grids `tried`, by default those that --target-bits chooses from.

        Yields the text, then a record after each block.
        """
        question = self._question(tried)
        text = self._calibration_set()
        yield text
        return (yield from self._measured(text, question, windows))

    def _measured(
        self, text: CalibrationSet, question: Question, windows: int = sensitivity.WINDOWS
    ) -> Generator[MeasuringStep, None, Sensitivity]:
        batch = self._windows_at_once(text)
        return (yield from sensitivity.measure(self.plan.skeleton, text.windows, question, batch=batch, judged=windows))

    def _question(self, tried: Sequence[WeightScheme] = ()) -> Question:
        plan = self.plan
        return assign.ask(
            plan.skeleton, plan.checkpoint, plan.settings, plan.stages.rounding, plan.layout, plan.options, tried
        )

    def _spend(self, text: CalibrationSet, target: float) -> Generator[MeasuringStep, None, None]:
        """Find out which layers get more bits, and go on as if the settings had said so."""
        found = yield from self._measured(text, self._question())
        spent = assign.spend(found, target)
        self.plan = self.plan.with_settings(assign.settled(self.plan.settings, spent))
        self.report.settings, self.report.left = config_to(self.plan.settings), self.plan.left()
        self.report.notes += [*found.notes, str(spent)]

    def _calibration_set(self) -> CalibrationSet:
        return self._text.load(self.plan, self.report)

    def _open_writer(self, text: CalibrationSet | None) -> Writer:
        plan = self.plan
        identity = {
            "llmq": __version__,
            "torch": torch.__version__,
            "source": plan.checkpoint.fingerprint(),
            "settings": {**config_to(plan.settings), "calibration": text.sha256 if text else None},
            "stages": dataclasses.asdict(plan.stages),
            "device": plan.device.type,
        }
        needed = save.copies(plan.settings.formats) * plan.expected_bytes
        if self._text.tuned_on is not None and plan.stages.tuning is not None:
            needed += end_to_end.disk_bytes(
                plan.skeleton, plan.layers.values(), plan.stages.tuning, self._text.tuned_on
            )
        writer = Writer.open(self.out, identity=identity, overwrite=self._overwrite, needed_bytes=needed)
        if writer.resumed_blocks:
            self.report.notes.append(
                f"continued: {writer.resumed_blocks} of {self.commits} blocks were finished earlier"
            )
        if writer.damaged_blocks:
            self.report.notes.append(f"blocks {writer.damaged_blocks} of an earlier run were damaged and are made anew")
        if writer.discarded:
            self.report.notes.append("an unfinished run with other settings was in the output folder; it was discarded")
        return writer

    def _pipeline_run(self, text: CalibrationSet | None, writer: Writer) -> Run:
        plan, stream = self.plan, None
        if text is not None:
            stream = Stream(
                plan.skeleton,
                text.windows,
                self._windows_at_once(text),
                memory.spare(plan.device),
                originals=bool(plan.stages.alphas) or plan.stages.block_tuning is not None,
                held_out=self._held_out(len(text.windows)),
                weights=self._token_weights(text, writer),
                tokens_per_input=plan.stages.expert_tokens,
                to_the_head=plan.settings.quantize_head,
            )
        reader = plan.layout.read_config(plan.quantization_config())
        return Run(plan.skeleton, stream, plan.layers, plan.stages, plan.options, plan.layout, reader, writer)

    def _token_weights(self, text: CalibrationSet, writer: Writer) -> TokenWeights | None:
        if not self.plan.stages.token_weights or all(writer.has(index) for index in range(self.blocks)):
            return None
        return token_weights.measure(self.plan.skeleton, text.windows, self.plan.settings.seed)

    def _windows_at_once(self, text: CalibrationSet) -> int:
        return max(1, TOKENS_PER_BATCH.get(self.plan.device.type, 4096) // text.windows.shape[1])

    def _held_out(self, windows: int) -> int:
        """How many of the calibration windows nothing is fitted on."""
        share = self.plan.stages.held_out
        held_out = min(math.ceil(share * windows), windows - 1)
        if share and not held_out:
            self.report.notes.append("one calibration window is too few to hold any out: no stage could be judged")
        return held_out

    def _finish(self, writer: Writer, start: float) -> Iterator[ConvertStep]:
        """Put the folder together: packed blocks, everything else as it was, configuration and provenance."""
        report, plan = self.report, self.plan
        quantized = {layer.name: layer for layer in report.layers}
        for layer in plan.layers.values():
            if layer.scheme is not None and layer.name not in quantized:
                report.left[layer.name] = f"it did not run on the first {pipeline.PROBE_TOKENS} calibration tokens"
        sizes = {layer.name: layer.weights for layer in plan.layers.values()}
        stored_bits = sum(sizes[name] * layer.bits_per_weight for name, layer in quantized.items())
        report.bits_per_weight = stored_bits / max(1, sum(sizes[name] for name in quantized))
        before = sum(plan.float_bytes(name) for name in quantized)
        report.file_bytes = plan.checkpoint.nbytes - before + round(stored_bits / 8)
        report.stages = [*record.summaries(report.layers), *record.block_summaries(report.blocks)]
        report.seconds = time.monotonic() - start
        report.peak_memory_bytes = record.peak_memory()
        yield from save.finish(writer, plan, report, set(quantized))


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    config: QuantConfig | None = None,
    device: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    stages: Method | None = None,
    **settings: Any,
) -> Report:
    """Quantize `model`, a folder or Hub id, into the folder `out`.

    Settings are those of `QuantConfig`, by name (`method="gptq"`, `bits=4`, `group_size=128`,
    `calibration=["text.txt"]`), on top of `config`; `stages` replace those of the method, for experiments.  An
    interrupted call continues when it is repeated.  Raises the errors of `llmq.errors`.
    """
    job = Job(
        model,
        out,
        merged(config or QuantConfig(), settings),
        stages=stages,
        device=device,
        revision=revision,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    for _ in job.run():
        pass
    return job.report


def default_output(model: str, settings: QuantConfig) -> Path:
    """`llama-gptq-4bit` in the current folder, for a model whose name or folder is `llama`."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    bits = settings.scheme.bits if settings.target_bits is None else settings.target_bits
    return Path(f"{name}-{settings.method}-{bits:g}bit")
