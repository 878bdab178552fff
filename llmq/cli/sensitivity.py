"""`llmq sensitivity MODEL`"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.manifest import print_manifest
from llmq.cli.terminal import messages, print_json, print_notes, print_table, quiet_transformers, show_measuring
from llmq.config import QuantConfig
from llmq.config_files import config_from, merged, parse_group_size, read_toml
from llmq.errors import ConfigError, Interrupted
from llmq.numerics.scheme import GroupSize, WeightScheme
from llmq.report.record import MeasuringStep

if TYPE_CHECKING:
    from llmq.job import Job
    from llmq.mixed_precision.assign import Spending
    from llmq.report.sensitivity import Sensitivity

GRIDS = ("3:128", "4:128", "4:32", "8:128")

PANEL, ORDER = "Inspect", 4


def command(
    model: options.Model,
    grids: Annotated[
        list[str] | None,
        Option(
            "--grid", metavar="BITS[:GROUP]",
            help=f"A grid to try.  Repeatable.  Default: {', '.join(GRIDS)}; with --target-bits those it chooses from.",
        ),
    ] = None,
    windows: Annotated[int, Option("--windows", min=1, help="Windows of text that the KL is measured on.")] = 8,
    target_bits: options.TargetBits = None,
    plot: Annotated[
        Path | None, Option("--plot", help="Draw a heat map into this file, such as map.png.")
    ] = None,
    method: options.Method = None,
    symmetric: options.Symmetric = None,
    format_: options.Format = None,
    skip: options.Skip = None,
    order: options.Order = None,
    scales: options.Scales = None,
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    config: options.Config = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure how much the model suffers from each layer on each grid: KL divergence in nats per token.

    Layers that serving engines run as one are rounded together, everything else stays as it is.  With --target-bits it
    also shows how `llmq quantize --target-bits` would spend so many bits.

    Example:  llmq sensitivity Qwen/Qwen3-8B --calibration text.jsonl --target-bits 4.5 --plot map.png
    """
    given = {
        "method": method, "symmetric": symmetric, "format": format_, "skip": skip, "order": order, "scales": scales,
        "calibration": calibration, "samples": samples, "seqlen": seqlen, "seed": seed, "target_bits": target_bits,
    }  # fmt: skip
    settings = merged(config_from(read_toml(config)) if config else QuantConfig(), given)
    if plot is not None:
        from llmq.report import heat_map

        heat_map.require_drawable(plot)  # before hours are spent
    tried = [_scheme(text, settings) for text in grids or (GRIDS if settings.target_bits is None else ())]
    from llmq.job import Job
    from llmq.mixed_precision import assign

    quiet_transformers()
    job = Job(model, None, settings, device=device, revision=revision, trust_remote_code=trust_remote_code)
    try:
        found = _measured(job, tried, windows)
    except KeyboardInterrupt:
        raise Interrupted("interrupted", hint="fewer --windows take less time") from None
    plan = None if settings.target_bits is None else assign.spend(found, settings.target_bits)
    if plot is not None:
        heat_map.draw(found, plot)
    if json:
        print_json(found.to_dict() | ({} if plan is None else {"plan": plan.to_dict()}))
    else:
        _print(model, found, plan)
    print_notes(found.notes)


def _scheme(text: str, settings: QuantConfig) -> WeightScheme:
    """`4`, `4:32` or `8:channel` as a grid with the zeros of the run."""
    bits, _, size = text.partition(":")
    if not bits.isdecimal():
        raise ConfigError(f"grid {text!r} is not understood", hint="give BITS or BITS:GROUP, such as 4:32")
    group: GroupSize = parse_group_size(size) if size else settings.scheme.group_size
    return WeightScheme(int(bits), group, settings.scheme.symmetric)


def _measured(job: "Job", tried: list[WeightScheme], windows: int) -> "Sensitivity":
    """Do the work, with what it reads and how far it is on stderr."""
    found: list[Sensitivity] = []

    def work() -> Iterator[MeasuringStep]:
        steps = job.measure_layers(tried, windows)
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                found.append(end.value)
                return
            if isinstance(done, MeasuringStep):
                yield done
            else:
                print_manifest(done.to_dict(), messages())
                print_notes(done.notes)

    show_measuring(work(), job.blocks)
    return found[0]


def _print(model: str, found: "Sensitivity", plan: "Spending | None") -> None:
    columns = ["layers", "weights", *found.grids, *(["plan"] if plan else [])]
    rows = []
    for index, unit in enumerate(found.units):
        shown = [f"{effect.kl:.2e}{'' if effect.measured else ' ~'}" for effect in unit.effects]
        planned = [plan.grids[index] or "as it is"] if plan else []
        rows.append((f"{unit.block}: {unit.label}", str(unit.weights), *shown, *planned))
    sums = [f"{sum(unit.effects[grid].kl for unit in found.units):.2e}" for grid in range(len(found.grids))]
    rows.append(("all together, if they add up", str(sum(unit.weights for unit in found.units)), *sums))
    print_table(f"KL divergence of {model} with these layers alone rounded, on {found.tokens} tokens", columns, rows)
    if any(not effect.measured for unit in found.units for effect in unit.effects):
        print("~ scaled from the coarsest grid's by the error of the layers' output")
    if plan is not None:
        print(plan)
