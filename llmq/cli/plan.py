"""`llmq plan MODEL`"""

import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.setting_options import with_settings
from llmq.cli.streams import print_text
from llmq.cli.terminal import messages, print_json, print_notes, print_table, quiet_transformers
from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.report.shown import duration, megabytes

if TYPE_CHECKING:
    from llmq.forecast import Fit, Forecast

PANEL, ORDER = "Quantization", 0
UNITS = {"k": 1000, "m": 10**6, "g": 10**9, "t": 10**12, "kb": 1000, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20}  # as models count their context: 32k is 32,768


@with_settings()
def command(
    model: options.Model,
    *,
    settings: QuantConfig,
    fit: Annotated[
        str | None,
        Option("--fit", metavar="MEMORY", help="Memory of the accelerator that will run the model, such as 24GB. Shows "
               "the largest grid that fits.", rich_help_panel=options.GENERAL),
    ] = None,
    context: Annotated[
        str | None,
        Option("--context", metavar="TOKENS", help="Tokens of context to keep room for, such as 32k; with --fit. "
               "Default: 8k, or the model's limit if that is shorter.", rich_help_panel=options.GENERAL),
    ] = None,
    trial: Annotated[
        bool,
        Option("--trial", help="Quantize one block with the chosen --method, and correct times and memory by what was "
               "measured. Reads the weights of the model.", rich_help_panel=options.GENERAL),
    ] = False,
    device: options.Device = "auto",
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Show what quantizing a model will cost, and what the result will need.

    Reads configuration files only: of a model on the Hub, no weights are
    downloaded. The times come from a short measurement of this machine, and
    may be wrong by a third, and by more for awq. --trial quantizes one block
    to correct them.

    Examples:
      llmq plan Qwen/Qwen3-8B
      llmq plan Qwen/Qwen3-32B --fit 24GB --context 32k
      llmq plan Qwen/Qwen3-8B --bits 3 --group-size 64 --json

    Exit codes:
      0  success                   4  unsupported model
      2  invalid settings, or      5  unusable text for --trial
         nothing fits in --fit     6  device not available
      3  unreadable model

    See also:
      llmq quantize --dry-run  the grid of each layer, from the checkpoint
    """
    memory = _quantity("--fit", fit, UNITS) if fit is not None else None
    tokens = _quantity("--context", context, TOKEN_UNITS) if context is not None else None
    if tokens is not None and memory is None:
        raise ConfigError("--context was given without --fit", hint="add the memory to fit into, such as --fit 24GB")
    begin(model, quiet=quiet)
    if not quiet:
        messages().print("[dim]counting parameters and measuring this machine[/]")
    from llmq import forecast

    quiet_transformers()
    configured = forecast.Configured.read(model, settings.calibration.seqlen, device, revision)
    fitting = None
    if memory is not None:
        fitting = forecast.fit(configured, settings, memory, tokens)
        settings = fitting.settings
    tried = None
    if trial:
        if not quiet:
            messages().print(f"[dim]quantizing one block with {settings.method}[/]")
        tried = forecast.try_block(model, settings, device=device, revision=revision)
    result = forecast.forecast(configured, settings, machine=None if tried is None else tried.machine, trial=tried)
    if json:
        print_json({**result.to_dict(), "fit": None if fitting is None else fitting.flags})
        return
    _print_forecast(result, settings)
    if tried is not None:
        print_text(str(tried))
    if fitting is not None:
        _print_fit(model, fitting)


def _quantity(flag: str, text: str, units: Mapping[str, int]) -> int:
    """`24GB`, `32k` and `8192` as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in units or not float(match[1]):
        example = "24GB or 512MiB" if "gb" in units else "32k or 8192"
        raise ConfigError(f"{flag} is {text!r}, expected a number with a unit", hint=f"for example {example}")
    return int(float(match[1]) * units[match[2]])


def _print_forecast(result: "Forecast", settings: QuantConfig) -> None:
    parameters = result.parameters
    counts = [
        ("linear layers of the blocks", parameters.linears),
        ("experts", parameters.experts),
        ("embedding", parameters.embedding),
        ("head", parameters.head),
        ("all others", parameters.other),
        ("together", parameters.total),
    ]
    shown = [(name, f"{count:,}", f"{count / parameters.total:.1%}") for name, count in counts if count]
    print_table(f"{result.source}: {result.architecture}", ("parameters", "number", "share"), shown)
    _print_layers(result)
    sizes = [("as it is", megabytes(result.stored_bytes), "", "")]
    sizes += [
        (size.format, megabytes(size.nbytes), f"{size.bits:.2f}", ", ".join(size.engines))
        for size in result.sizes
        if not size.refusal
    ]
    print_table("size of weights", ("format", "size", "bits/weight", "engines"), sizes)
    print_notes([f"not in format {size.format}: {size.refusal}" for size in result.sizes if size.refusal])
    costs = [
        (cost.method, duration(cost.seconds), *([megabytes(cost.device_bytes)] if result.device != "cpu" else []),
         megabytes(cost.host_bytes), megabytes(cost.disk_bytes))
        for cost in result.costs
    ]  # fmt: skip
    calibration, gpu = settings.calibration, ["GPU memory"] if result.device != "cpu" else []
    text = f"{calibration.samples} x {calibration.seqlen} calibration tokens on {result.device}"
    print_table(f"cost of quantizing, {text}", ("method", "time", *gpu, "main memory", "disk"), costs)
    print_text(f"keys and values of {1000:,} tokens take {megabytes(1000 * result.bytes_per_token)} in 16 bits")
    if result.cpu_copy_bytes:
        copied = megabytes(result.cpu_copy_bytes)
        print_text(f"llmq.load on a CPU keeps a second copy of weights: {copied}, none with LLMQ_CPU_INT4=off")


def _print_layers(result: "Forecast") -> None:
    """Print the grid of each layer: one table, or one per run where the formats have several grids."""
    runs = dict.fromkeys(kind.formats for kind in result.layers)
    for formats in runs:
        layers = [
            (kind.name, str(kind.number), f"{kind.shape[0]} x {kind.shape[1]}", kind.grid, kind.reason)
            for kind in result.layers
            if kind.formats == formats
        ]
        title = f"linear layers of {', '.join(formats)}" if len(runs) > 1 else "linear layers"
        print_table(title, ("layer", "number", "shape", "grid", "note"), layers)


def _print_fit(model: str, fitting: "Fit") -> None:
    whole = fitting.weight_bytes + fitting.cache_bytes
    rows: list[tuple[str, Any]] = [
        ("weights", f"{megabytes(fitting.weight_bytes)}, {fitting.bits_per_weight:.2f} bits per quantized weight"),
        (f"keys and values of {fitting.context:,} tokens", megabytes(fitting.cache_bytes)),
        ("together", f"{megabytes(whole)} of {megabytes(fitting.memory)}, of which a tenth is reserved"),
    ]
    if fitting.cpu_copy_bytes:
        copied = megabytes(fitting.cpu_copy_bytes)
        rows.append(("in llmq.load on a CPU", f"{copied} more, for a second copy of weights"))
    print_table(f"fits: {fitting.flags}", ("", "value"), rows)
    print_text(f"next: llmq quantize {shlex.quote(model)} {fitting.flags}, and your other options")
