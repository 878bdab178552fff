"""Quantize one block of a model, and correct the estimate of the whole run by the measured time and memory.

The block is quantized with the method of the settings, on random tokens, and as the only block of its model. The
estimate of this small model is compared with the measured times, stage by stage, and with the measured memory:

    time of a stage   *= measured / estimated seconds of this stage; of other stages: of all stages together
    memory            += measured - estimated bytes
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from llmq import cost, pipeline
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig
from llmq.cost.estimate import Estimate
from llmq.cost.machine import Machine
from llmq.job import Job
from llmq.memory import Economy
from llmq.model.passes.streams import Text
from llmq.report.peak import device_memory, peak_memory
from llmq.report.timeline import Timeline
from llmq.run_text import sequences_at_once
from llmq.schedule import stages
from llmq.steps import separate_grids


@dataclass(frozen=True)
class Trial:
    """What one block has taken, compared with the estimate for it.

    ratios   measured / estimated seconds, by stage of the estimate
    common   measured / estimated seconds, all stages together
    seconds  measured
    nbytes   measured - estimated peak memory
    """

    machine: Machine
    ratios: Mapping[str, float]
    common: float
    seconds: float
    nbytes: int

    def __str__(self) -> str:
        return (
            f"trial: one block took {self.seconds:.1f} s, {self.common:.2f} times the estimate, and "
            f"{self.nbytes / 1e6:+.0f} MB of memory; the table is corrected"
        )

    def corrected(self, estimate: Estimate) -> Estimate:
        """The estimate of a whole run, for any method."""
        corrected = [
            replace(stage, seconds=stage.seconds * self.ratios.get(stage.name, self.common))
            for stage in estimate.stages
        ]
        peaks = [
            replace(peak, device={**peak.device, "measured in a trial": float(self.nbytes)}) for peak in estimate.peaks
        ]
        return replace(estimate, stages=tuple(corrected), peaks=tuple(peaks))


def try_block(model: str, settings: QuantConfig, *, device: str = "auto", revision: str | None = None) -> Trial:
    """Quantize the first block of `model` for the first of several grids; writes into a temporary folder only.

    Raises what a job raises.
    """
    settings = separate_grids.of_each_grid(settings)[0]
    tried = replace(settings.stages.with_given_text_only(), tuning=None)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, Path(folder) / "out", settings, stages=tried, device=device, revision=revision)
        plan, blocks = job.plan, job.plan.skeleton.blocks
        del blocks[1:]
        paths = {path: layer for path, layer in plan.layers.items() if path in blocks[0].linears}
        job.plan = plan = dataclasses.replace(plan, layers=MappingProxyType(paths))
        outline = cost.observe(plan.skeleton, settings.calibration.seqlen)
        machine = cost.measure(str(plan.device))
        estimate = stages.estimated(plan, outline, machine)
        timeline = Timeline()
        timeline.take(stages.stages_of(estimate, outline, plan))
        text = _random_text(job, settings) if tried.needs_calibration else None
        writer = Writer.open(job.out, identity={}, overwrite=False, needed_bytes=0)
        try:
            pipeline.quantize_model(job.prepare(text, writer, timeline.take, Economy.NONE), save=lambda run: None)
        finally:
            writer.abandon()
    return _compared(machine, estimate, timeline)


def _random_text(job: Job, settings: QuantConfig) -> Text:
    """Tokens in the place of the calibration text."""
    shape, share = (settings.calibration.samples, settings.calibration.seqlen), job.plan.stages.validation
    tokens = torch.randint(job.plan.skeleton.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    validation = min(-int(-share * len(tokens) // 1), len(tokens) - 1)
    return Text(tokens, sequences_at_once(tokens, job.plan.device), validation)


def _compared(machine: Machine, estimate: Estimate, timeline: Timeline) -> Trial:
    ratios: dict[str, float] = {}
    for name, parts in stages.STAGES.items():
        stage = timeline.stages.get(name)
        if stage is not None and stage.spent and stage.expected:
            ratios |= dict.fromkeys(parts, stage.spent / stage.expected)
    spent = sum(stage.spent for stage in timeline.stages.values() if stage.spent)
    expected = sum(stage.expected for stage in timeline.stages.values() if stage.spent)
    on_device = estimate.device != "cpu"
    measured, planned = (device_memory(), estimate.device_bytes) if on_device else (peak_memory(), estimate.host_bytes)
    return Trial(machine, ratios, spent / expected if expected else 1.0, spent, measured - planned)
