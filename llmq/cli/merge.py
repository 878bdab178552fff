"""`llmq merge MODEL ADAPTER OUT`"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import interruptible, print_done, print_json, print_notes, print_table, quiet_transformers
from llmq.cli.verdict import print_verdict, require
from llmq.config import CONVERTIBLE, QuantConfig
from llmq.methods import METHODS
from llmq.numerics.scheme import BITS, GROUP_SIZES
from llmq.report.shown import megabytes
from llmq.setting_fields import merged, read_toml

GROUPS = (*GROUP_SIZES, "channel", "tensor")

PANEL, ORDER = "Quantization", 4


def command(
    model: Annotated[
        str, Argument(help="A quantized model, or the float model: a folder or a Hub id.", metavar="MODEL")
    ],
    adapter: Annotated[
        str, Argument(help="A LoRA adapter of PEFT: a folder with adapter_config.json, or a Hub id.", metavar="ADAPTER")
    ],
    out: Annotated[Path, Argument(help="The output folder.", metavar="OUT")],
    calibration: Annotated[
        list[str] | None,
        Option("--calibration", metavar="SOURCE", help="Calibration data, as of llmq quantize. Repeatable."),
    ] = None,
    method: Annotated[
        str | None, options.choice("--method", tuple(METHODS), "Quantization method. Default: gptq.")
    ] = None,
    bits: Annotated[
        int | None, options.choice("--bits", BITS, "Bits per quantized value. Default: those of MODEL, or 4.")
    ] = None,
    group_size: Annotated[
        str | None,
        options.choice("--group-size", GROUPS, "Columns that share a scale. Default: that of MODEL, or 128."),
    ] = None,
    format: Annotated[
        str | None, options.choice("--format", CONVERTIBLE, "File format. Default: that of MODEL.")
    ] = None,
    samples: Annotated[int | None, Option("--samples", min=1, help="Number of calibration sequences.")] = None,
    seqlen: Annotated[int | None, Option("--seqlen", min=1, help="Tokens per calibration sequence.")] = None,
    config: options.Config = None,
    max_kl: options.MaxKl = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:
    """Merge a LoRA adapter into a model, and quantize the merged weights.

    The adapter is added to the float weights, or to the dequantized weights
    of a quantized model. Merged weights are rounded again with calibration
    text, on the grids of the model; all others keep their values, unless the
    grid is one of floats (nvfp4, mxfp4, fp8). At the end the result is
    compared with the merged floats: that is the cost of the merge, shown next
    to round to nearest. DoRA and other kinds are refused.

    Examples:
      llmq merge out-4bit/ my-adapter/ merged/ --calibration text.jsonl
      llmq merge Qwen/Qwen3-8B my-adapter/ merged/ --calibration text.jsonl

    Exit codes:
      0  success                   5    unusable calibration text
      2  invalid settings          6    device not available
      3  unreadable model          7    output cannot be written
      4  unsupported adapter       8    worse than --max-kl allows
                                   130  interrupted

    See also:
      llmq train     train the quantized values themselves
      llmq quantize  a fine-tuned model that is merged already
    """
    begin(model, quiet=quiet)
    from llmq.checkpoint import hub
    from llmq.training.merge import like_base, merge

    quiet_transformers()
    given = {
        "calibration": calibration or None, "method": method, "bits": bits, "group_size": group_size,
        "format": format, "samples": samples, "seqlen": seqlen,
    }  # fmt: skip
    below = QuantConfig.model_validate(read_toml(config)) if config else QuantConfig(method="gptq")
    settings = merged(like_base(hub.locate(model, remote_code=trust_remote_code), below), given)
    hint = "repeat the command: it continues after the last finished block"
    with interruptible(hint), ProgressDisplay(silent=quiet, log=log_json) as display:
        report = merge(
            model, adapter, out, settings, device=device, overwrite=overwrite, trust_remote_code=trust_remote_code,
            on_event=display,
        )  # fmt: skip
    print_notes(report.notes)
    print_done("done:", f" {out}")
    if json:
        print_json(report.to_dict())
    else:
        kept = sum(bool(layer.existing_grid) for layer in report.layers)
        rows = [
            ("rounded again", f"{len(report.layers) - kept} layers"),
            ("values kept", f"{kept} layers"),
            ("size of weights", f"{megabytes(report.original_bytes)} → {megabytes(report.file_bytes)}"),
            ("output", str(out)),
        ]
        print_table("merged", ("", "value"), rows)
        print_verdict(report.verdict)
    require(report.verdict, max_kl, out)
