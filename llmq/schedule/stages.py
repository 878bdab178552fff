"""What a job is expected to cost, stage by stage as it reports its progress."""

from dataclasses import replace

from llmq import cost
from llmq.cost.estimate import SOLVED, Estimate
from llmq.cost.machine import Machine
from llmq.cost.outline import Outline
from llmq.errors import UnsupportedModelError
from llmq.mixed_precision import assign, sensitivity
from llmq.report import events
from llmq.report.events import Planned
from llmq.run_plan import Plan
from llmq.source_names import parse_sources

WORTH_MEASURING = 60.0  # seconds: a shorter job does not measure the machine, which takes two seconds
# Seconds of Python code that runs once in each job, however small the model is: nothing in the estimate counts it.
ONCE = {events.PROBE: 0.12, events.QUANTIZING: 0.1, events.SAVING: 0.16}
ONCE |= {events.evaluating(events.ORIGINAL): 0.08, events.SCORING: 0.06}
EVALUATED = (events.ORIGINAL, events.FINISHED, events.NEAREST)
# The stages that a job reports, in order, and the stages of the estimate that they consist of.
STAGES = {
    events.PROBE: ("float model",),
    events.WRITTEN: ("self-written text",),
    events.WEIGHTING: ("Fisher information",),
    events.TRANSFORMS: ("transforms",),
    events.QUANTIZING: ("streams", "statistics", *SOLVED),
    events.BLOCK_TUNING: ("block tuning",),
    events.TUNING: ("end-to-end tuning",),
    events.SAVING: ("files", "formats"),
    **{name: (name,) for name in (*map(events.evaluating, EVALUATED), events.SCORING, events.CONTINUING)},
}


def planned(plan: Plan, ranks: int = 1) -> Planned:
    """The stages of a job."""
    outline = _observed(plan)
    if outline is None:
        return Planned({events.QUANTIZING: 1.0}, {block.path: 1.0 for block in plan.skeleton.blocks})
    return stages_of(_measured(plan, outline, ranks), outline, plan)


def planned_measuring(plan: Plan, grids: int, windows: int) -> Planned:
    """The stages of measuring the layers on some grids, on some sequences."""
    outline = _observed(plan)
    if outline is None:
        return Planned({events.MEASURING: 1.0})
    estimate = _measured(plan, outline)
    written, measured = estimate.seconds_of("self-written text"), measuring(estimate, outline, grids, windows)
    return Planned({**({events.WRITTEN: written} if written else {}), events.MEASURING: measured}, in_seconds=True)


def _observed(plan: Plan) -> Outline | None:
    """The outline of the model; None if it cannot be run without its weights."""
    try:
        return cost.observe(plan.skeleton, plan.settings.calibration.seqlen)
    except UnsupportedModelError:
        return None


def _measured(plan: Plan, outline: Outline, ranks: int = 1) -> Estimate:
    """The estimate for this machine, or, if the job is short and needs no GPU, for a typical one."""
    if plan.device.type == "cpu":
        estimate = estimated(plan, outline, cost.typical(), ranks)
        if estimate.seconds <= WORTH_MEASURING:
            return estimate
    return estimated(plan, outline, cost.measure(str(plan.device)), ranks)


def estimated(plan: Plan, outline: Outline, machine: Machine, ranks: int = 1) -> Estimate:
    """The estimate of the plan; text that replaces calibration text counts as written in addition."""
    stages = plan.stages
    if any(source.is_self for source in parse_sources(plan.settings.calibration.sources)):
        stages = replace(stages, written=stages.written + 1)
    return cost.estimate(
        outline, plan.settings, machine, layers=plan.layers, stages=stages, stored=plan.model_dtype, ranks=ranks
    )


def stages_of(estimate: Estimate, outline: Outline, plan: Plan) -> Planned:
    """The estimate by the stages that a job reports."""
    seconds = {name: estimate.seconds_of(*parts) for name, parts in STAGES.items()}
    seconds |= {name: seconds[name] + once for name, once in ONCE.items() if seconds[name]}
    if plan.settings.target_bits is not None:
        seconds[events.MEASURING] = measuring(estimate, outline, len(assign.GRIDS) + 1, sensitivity.WINDOWS)
    names = {path: layer.name for path, layer in plan.layers.items()}
    shares, head = estimate.shares, plan.skeleton.head_path
    blocks = {**shares.blocks, **({head: shares.head} if head in names and head is not None else {})}
    calibration = plan.settings.calibration
    sequences = plan.stages.read_of(calibration.samples) * (1 + plan.stages.written)
    return Planned(
        {name: expected for name, expected in seconds.items() if expected},
        blocks,
        {names[path]: expected for path, expected in shares.layers.items() if path in names},
        sequences * calibration.seqlen if plan.stages.needs_calibration else 0,
        in_seconds=True,
        host_bytes=estimate.host_bytes,
        device_bytes=estimate.device_bytes,
    )


def measuring(estimate: Estimate, outline: Outline, grids: int, windows: int) -> float:
    """Seconds to measure the layers: the text goes through all blocks, and `windows` sequences of each variant, too.

    A variant, in which some layers are on one of the `grids`, goes through half of the blocks on average.
    """
    blocks, text = len(outline.blocks), estimate.seconds_of("streams")
    groups = sum(len(block.groups) for block in outline.blocks)
    variants = groups * (grids if blocks <= sensitivity.MEASURED_BLOCKS else 1)
    return text * (1 + variants / 2 * windows / max(1, estimate.sequences))
