"""The estimate of a run: work, time and peak memory of each stage."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from llmq import formats
from llmq.config import QuantConfig
from llmq.cost import files, passes, peaks, solver, verdict
from llmq.cost.files import Sizes
from llmq.cost.machine import Machine
from llmq.cost.outline import Outline, observe
from llmq.cost.peaks import Peak
from llmq.cost.shares import Shares, shares
from llmq.cost.work import Kind, Work, total
from llmq.cost.workload import Group, PlannedBlock, Workload
from llmq.formats.base import Layout
from llmq.methods import Method
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import GROUP_SIZES, WeightScheme

# What ranks share by sequences, and by layers.
DIVIDED = ("Fisher information", "streams", "statistics", "block tuning", "end-to-end tuning")
SOLVED = ("factorization", "rounding", "guards", "report")
IN_BLOCKS = ("streams", "transforms", "statistics", *SOLVED, "block tuning")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its work on each rank, and the time for it."""

    name: str
    work: Work
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    stages      in the order in which a run reports them
    peaks       peak memory of the stages that need most
    file_bytes  bytes of all tensors of the quantized model
    device      "cpu" or "cuda"
    shares      how the time in the loop over blocks is distributed
    sequences   that go through each block
    """

    stages: tuple[Stage, ...]
    peaks: tuple[Peak, ...]
    file_bytes: int
    device: str
    shares: Shares = Shares()
    sequences: int = 0

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def work(self) -> Work:
        return total([stage.work for stage in self.stages])

    @property
    def device_bytes(self) -> int:
        """Peak memory of a GPU; 0 for a CPU, whose memory is main memory."""
        return 0 if self.device == "cpu" else max(peak.device_bytes for peak in self.peaks)

    @property
    def host_bytes(self) -> int:
        """Peak main memory."""
        on_device = self.device != "cpu"
        return max(peak.host_bytes + (0 if on_device else peak.device_bytes) for peak in self.peaks)

    @property
    def disk_bytes(self) -> int:
        return max(peak.disk_bytes for peak in self.peaks)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def seconds_of(self, *names: str) -> float:
        """The seconds of some stages; a stage without work has none."""
        return sum(stage.seconds for stage in self.stages if stage.name in names)

    def table(self) -> str:
        """Text with a line per stage, and a line per peak."""
        lines = [f"{'stage':20} {'TFLOP':>10} {'GB moved':>10} {'GB files':>10} {'seconds':>10}"]
        for stage in (*self.stages, Stage("together", self.work, self.seconds)):
            moved, disk = stage.work[Kind.MOVED], stage.work[Kind.READ] + stage.work[Kind.WRITTEN]
            lines.append(
                f"{stage.name:20} {stage.work.flops / 1e12:10.3f} {moved / 1e9:10.2f} {disk / 1e9:10.2f} "
                f"{stage.seconds:10.1f}"
            )
        lines.append(f"\n{'peak memory in':20} {'GB device':>10} {'GB host':>10} {'GB disk':>10}")
        for peak in self.peaks:
            figures = (peak.device_bytes, peak.host_bytes, peak.disk_bytes)
            lines.append(f"{peak.stage:20} {' '.join(f'{nbytes / 1e9:10.3f}' for nbytes in figures)}")
        lines.append(f"\nthe files have {self.file_bytes / 1e9:.3f} GB")
        return "\n".join(lines)


def estimate(
    model: Skeleton | Outline,
    settings: QuantConfig,
    machine: Machine,
    *,
    layers: Mapping[str, LayerPlan] | None = None,
    stages: Method | None = None,
    stored: torch.dtype = torch.bfloat16,
    ranks: int = 1,
) -> Estimate:
    """Estimate a run on `machine`, without reading a weight.

    model   a skeleton (of a checkpoint, or `skeleton_of` a configuration), or what `observe` has made of it
    layers  the plan of each linear layer by its path; by default every layer gets the grid of the settings
    stages  the stages of the method, if they replace those of `settings.method`
    stored  the dtype of the checkpoint
    ranks   processes with a device each, that share the work on the text and the layers
    """
    outline = model if isinstance(model, Outline) else observe(model, settings.calibration.seqlen)
    grids = _grids(outline, settings, layers)
    work = Workload(outline, stages or settings.stages, settings, grids, stored.itemsize, machine.device, ranks)
    layout = _layout(settings)
    head = settings.scheme if settings.quantize_head else None
    sizes = files.sizes(work, layout, layout.scale_dtype(stored), head)
    writing = peaks.self_written(work, machine)
    if writing is not None and work.method.given < 1 and not peaks.is_writable(writing, machine):
        work = replace(work, method=work.method.with_given_text_only())
    work = replace(work, repeats=_repeats(work, machine, sizes))
    costed = [_stage(name, amount, work, machine) for name, amount in _work(work, machine, sizes, head).items()]
    measured = (
        peaks.self_written(work, machine),
        peaks.fisher(work, machine),
        peaks.quantizing(work, machine, sizes),
        peaks.block_tuning(work, machine, sizes),
        peaks.end_to_end(work, machine, sizes),
    )
    return Estimate(
        tuple(stage for stage in costed if stage.work.amounts),
        tuple(peak for peak in measured if peak is not None),
        sizes.model,
        machine.device,
        shares(work, machine, head),
        work.sequences,
    )


def _grids(
    outline: Outline, settings: QuantConfig, layers: Mapping[str, LayerPlan] | None
) -> dict[str, WeightScheme | None]:
    if layers is not None:
        return {path: plan.scheme.weights for path, plan in layers.items()}
    layers_of = [(path, layer) for path, b in zip(outline.paths, outline.blocks, strict=True) for layer in b.layers]
    shapes = {f"{path}.{layer.name}": layer for path, layer in layers_of}
    return {path: _fitting(settings.scheme_for(path), layer.in_features) for path, layer in shapes.items()}


def _fitting(grid: WeightScheme | None, in_features: int) -> WeightScheme | None:
    """`grid`, or with the largest smaller group that divides the row; else one scale per row."""
    if grid is None or not isinstance(grid.group_size, int) or in_features % grid.group_size == 0:
        return grid
    smaller = [size for size in GROUP_SIZES if size < grid.group_size and in_features % size == 0]
    return replace(grid, group_size=max(smaller, default="channel"))


def _layout(settings: QuantConfig) -> Layout:
    """The first safetensors format of the run, in which blocks are staged."""
    known = formats.names()
    return formats.load(
        next((name for name in settings.formats if name in known and name != "gguf"), "compressed-tensors")
    )


def _repeats(work: Workload, machine: Machine, sizes: Sizes) -> bool:
    """Whether the activations of the whole text do not fit into memory."""
    if not work.method.needs_calibration:
        return False
    peak = peaks.quantizing(work, machine, sizes)
    return sum(peak.device.values()) > machine.free_device


def _work(work: Workload, machine: Machine, sizes: Sizes, head: WeightScheme | None) -> dict[str, Work]:
    """The work of each stage on one rank that does all of it."""
    by_stage = {"float model": passes.float_probe(work)}
    by_stage |= {"self-written text": passes.self_written(work), "Fisher information": passes.fisher(work)}
    parts: dict[str, list[Work]] = {name: [] for name in IN_BLOCKS}
    last = PlannedBlock(work.outline.blocks[-1], _last_grids(work))
    for block, number in work.blocks():
        inner = number - (block == last)
        parts["streams"] += [passes.streams(work, block, last=False) * inner]
        parts["block tuning"] += [passes.block_tuning(work, block) * number]
        parts["transforms"] += [passes.transforms(work, block) * number]
        for group in block.groups:
            _add_group(parts, work, group, number)
    parts["streams"].append(passes.streams(work, last, last=True))
    if head is not None:
        rows = Group(work.outline.width, (work.outline.vocabulary,), (head,), 1.0)
        _add_group(parts, replace(work, at_head=True), rows, 1)
    by_stage |= {name: total(amounts) for name, amounts in parts.items()}
    tunes = peaks.tunes_model(work, machine)
    by_stage["end-to-end tuning"] = passes.end_to_end(work) if tunes else Work()
    others = len(work.settings.formats) - any(name in formats.names() for name in work.settings.formats)
    by_stage["formats"] = passes.converted(work) * others if work.settings.format not in GGUF_GRIDS else Work()
    by_stage["files"] = files.transfers(
        work if tunes else replace(work, method=replace(work.method, tuning=None)),
        sizes,
        packed_in_memory=peaks.packed_in_memory(machine, sizes),
    )
    return by_stage | verdict.by_stage(work, machine, sizes)


def _add_group(parts: dict[str, list[Work]], work: Workload, group: Group, number: int) -> None:
    if group.rows:
        for name, amount in solver.by_stage(work, group).items():
            parts[name].append(amount * number)


def _last_grids(work: Workload) -> tuple[WeightScheme | None, ...]:
    path, outline = work.outline.paths[-1], work.outline.blocks[-1]
    return tuple(work.grid(path, layer) for layer in outline.layers)


def _stage(name: str, amount: Work, work: Workload, machine: Machine) -> Stage:
    """The share of one rank, with the sums that ranks exchange."""
    ranks = work.ranks
    if ranks > 1 and name in DIVIDED:
        amount = amount * (1 / ranks) + Work.of(Kind.SENT, _exchanged(name, work))
    if ranks > 1 and name in SOLVED:
        layers = max(len(group.rows) for block, _ in work.blocks() for group in block.groups)
        amount = amount * (1 / min(ranks, max(1, layers)))
    return Stage(name, amount, machine.seconds(amount))


def _exchanged(name: str, work: Workload) -> float:
    """Bytes that each rank sends, in a ring: twice the summed tensors."""
    if name == "statistics":
        return sum(
            2 * peaks.statistics(work, group) * number for block, number in work.blocks() for group in block.groups
        )
    if name == "Fisher information":
        return 2 * (peaks.fisher_bytes(work) + peaks.moment_bytes(work))
    weights = 2.0 * 4 * work.packed_weights
    tuning = {"block tuning": work.method.block_tuning, "end-to-end tuning": work.method.tuning}.get(name)
    return 0.0 if tuning is None else tuning.steps * weights
