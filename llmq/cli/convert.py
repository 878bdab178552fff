"""`llmq convert PATH OUT --to FORMAT`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import interruptible, print_done, print_json, print_notes, print_table, quiet_transformers
from llmq.config import CONVERTIBLE
from llmq.export import ACTIVATIONS, FLOAT, FLOAT_DTYPES, ONNX
from llmq.report.shown import megabytes

if TYPE_CHECKING:
    from llmq.export.conversion import Conversion

SHOWN = 12

PANEL, ORDER = "Quantization", 2


def command(
    path: Annotated[str, Argument(help="A quantized model: a folder, a Hub id or a .gguf file.", metavar="PATH")],
    out: Annotated[Path, Argument(help="The output folder.", metavar="OUT")],
    to: Annotated[str, options.choice("--to", (*CONVERTIBLE, FLOAT, ONNX), "The format to write.")],
    dtype: Annotated[
        str | None,
        options.choice("--dtype", FLOAT_DTYPES, "For --to float: the dtype of the weights. Default: float32."),
    ] = None,
    activations: Annotated[
        str | None,
        options.choice(
            "--activations",
            ACTIVATIONS,
            "For --to onnx: int8 rounds the inputs of quantized layers to 8 bits, which is faster and less exact. "
            "Default: none.",
        ),
    ] = None,
    allow_requantize: Annotated[
        bool,
        Option(
            "--allow-requantize",
            help="Re-quantize weights that the format cannot hold unchanged; the error of each is shown.",
        ),
    ] = False,
    source: Annotated[
        str | None,
        Option(
            "--source",
            help="For a .gguf file: the original model, whose configuration and tokenizer are used. Default: those in "
            "the folder of the file.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:
    """Write a quantized model in another format, without quantizing again.

    Every weight is read back and compared with the original. A weight that
    the format cannot hold is an error, unless --allow-requantize is given.
    An interrupted conversion continues when the same command is given again;
    after the end, it reports that the conversion has finished already.

    --to float writes a plain float model with the values of the quantized
    weights, for tools that read no quantized format; the only format for
    every block type of a .gguf file. --to onnx writes a graph
    for ONNX Runtime and OpenVINO with the quantized weights in it; it needs
    the extra `onnx`, and memory for the model in float32.

    Examples:
      llmq convert out/ out-gptq/ --to gptq
      llmq convert out/ out-float/ --to float --dtype bfloat16
      llmq convert out/ out-onnx/ --to onnx

    Exit codes:
      0  success                   4    unsupported model
      2  invalid options, or       6    package missing
         format cannot hold it     7    output cannot be written
      3  unreadable model          130  interrupted

    See also:
      llmq quantize --format gptq,gguf  several formats at once
    """
    begin(path, quiet=quiet)
    from llmq.export.any_format import convert

    quiet_transformers()
    hint = "repeat the command: it continues where it stopped"
    with interruptible(hint), ProgressDisplay(silent=quiet, log=log_json) as display:
        report = convert(
            path, out, to=to, dtype=dtype, activations=activations, source=source,
            allow_requantize=allow_requantize, overwrite=overwrite, trust_remote_code=trust_remote_code,
            on_event=display,
        )  # fmt: skip
    print_notes(report.notes)
    print_done("finished already:" if report.finished else "done:", f" {out}")
    if json:
        print_json(report.to_dict())
    else:
        _print(report)


def _print(report: "Conversion") -> None:
    if report.requantized:
        worst = sorted(report.requantized.items(), key=lambda item: -item[1])
        rows = [(name, f"{error:.2%}") for name, error in worst[:SHOWN]]
        print_table("re-quantized weights with the largest error", ("weight", "error"), rows)
    rows = [
        ("format", f"{report.source_format} → {report.format}"),
        ("size of weights", f"{megabytes(report.source_bytes)} → {megabytes(report.output_bytes)}"),
        ("unchanged", f"{report.compared} tensors compared, {report.differ} differ"),
        *([("re-quantized", f"{len(report.requantized)} tensors")] if report.requantized else []),
        ("output", report.output),
    ]
    print_table("result", ("", "value"), rows)
