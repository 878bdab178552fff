"""`llmq sensitivity MODEL`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.setting_options import with_settings
from llmq.cli.streams import print_text
from llmq.cli.terminal import interruptible, print_json, print_notes, print_table, quiet_transformers
from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.numerics.scheme import FLOAT_GRIDS, GroupSize, WeightScheme
from llmq.setting_fields import parse_number

if TYPE_CHECKING:
    from llmq.mixed_precision.assign import Spending
    from llmq.report.sensitivity import Sensitivity

GRIDS = ("3:128", "4:128", "4:32", "8:128")
NOT_MEASURED = ("bits", "group_size", "overrides", "preset", "strict", "damping", "rotate", "quantize_head")

PANEL, ORDER = "Inspect", 4


@with_settings(without=NOT_MEASURED)
def command(
    model: options.Model,
    grids: Annotated[
        list[str] | None,
        Option(
            "--grid", metavar="BITS[:GROUP]",
            help="Bits and group size to measure, such as 4:32 or 8:channel. Repeatable. "
            f"Default: {', '.join(GRIDS)}; with --target-bits the grids that it chooses from.",
            rich_help_panel="Quantization",
        ),
    ] = None,
    windows: Annotated[
        int,
        Option(
            "--windows", min=1, help="Sequences that the KL divergence is measured on. More reduce the noise.",
            rich_help_panel="Calibration",
        ),
    ] = 8,
    *,
    settings: QuantConfig,
    plot: Annotated[
        Path | None,
        Option("--plot", help="Draw a heat map into this file, such as map.png.", rich_help_panel=options.GENERAL),
    ] = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure how sensitive each layer is to quantization.

    Each layer alone is quantized; the table shows the KL divergence to the
    original model in nats per token. Layers that serving engines fuse are
    quantized together. With --target-bits the table also shows which bits
    llmq quantize --target-bits would give each layer. With --activations the
    inputs of each layer alone are quantized, and not its weights; the table
    begins with the layers that lose most.

    Examples:
      llmq sensitivity Qwen/Qwen3-8B --target-bits 4.5 --plot map.png
      llmq sensitivity Qwen/Qwen3-8B --activations int8:static

    Exit codes:
      0  success                   4    unsupported model
      2  invalid settings          5    unusable calibration text
      3  unreadable model          6    device not available
                                   130  interrupted

    See also:
      llmq quantize  --target-bits, --override and --skip use the result
    """
    if plot is not None:
        from llmq.report import heat_map

        heat_map.require_drawable(plot)  # before the long measurement
    if grids and settings.activations != "none":
        raise ConfigError(
            "--grid is for weights, but --activations measures the inputs of layers",
            hint="leave one of them out",
        )
    schemes = [_scheme(text, settings) for text in grids or (GRIDS if settings.target_bits is None else ())]
    begin(model, quiet=quiet)
    from llmq.job import Job
    from llmq.mixed_precision import assign

    quiet_transformers()
    job = Job(model, None, settings, device=device, revision=revision, trust_remote_code=trust_remote_code)
    hint = "use fewer --windows to save time"
    with interruptible(hint), ProgressDisplay(silent=quiet, log=log_json) as display:
        result = job.measure_layers(schemes, windows, display)
    plan = None if settings.target_bits is None else assign.spend(result, settings.target_bits)
    if plot is not None:
        heat_map.draw(result, plot)
    if json:
        print_json(result.to_dict() | ({} if plan is None else {"plan": plan.to_dict()}))
    else:
        _print(model, result, plan)
    print_notes(result.notes)


def _scheme(text: str, settings: QuantConfig) -> WeightScheme:
    """Parse `4`, `4:32`, `8:channel` or `nvfp4` as a grid; symmetric or not like the settings."""
    if text in FLOAT_GRIDS:
        return WeightScheme.of_floats(text)
    bits, _, size = text.partition(":")
    if not bits.isdecimal():
        raise ConfigError(f"invalid grid {text!r}", hint="give BITS or BITS:GROUP, such as 4:32, or nvfp4 or mxfp4")
    group: GroupSize = parse_number(size) if size else settings.scheme.group_size
    return WeightScheme(int(bits), group, settings.scheme.symmetric)


def _print(model: str, result: "Sensitivity", plan: "Spending | None") -> None:
    columns = ["layers", "weights", *result.grids, *(["plan"] if plan else [])]
    rows = []
    by_inputs = result.grids[0].startswith("inputs")
    for index, unit in sorted(enumerate(result.units), key=lambda pair: -pair[1].effects[0].kl if by_inputs else 0):
        shown = [f"{effect.kl:.2e}{'' if effect.measured else ' ~'}" for effect in unit.effects]
        planned = [plan.grids[index] or "float"] if plan else []
        rows.append((f"{unit.block}: {unit.label}", str(unit.weights), *shown, *planned))
    sums = [f"{sum(unit.effects[grid].kl for unit in result.units):.2e}" for grid in range(len(result.grids))]
    rows.append(("sum", str(sum(unit.weights for unit in result.units)), *sums))
    what = "the inputs of these layers" if by_inputs else "these layers"
    print_table(f"KL divergence of {model} with only {what} quantized, on {result.tokens} tokens", columns, rows)
    if any(not effect.measured for unit in result.units for effect in unit.effects):
        print_text("~ not measured: scaled from the coarsest grid by the output error of the layers")
    if plan is not None:
        print_text(str(plan))
