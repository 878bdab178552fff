"""`llmq train MODEL OUT --data FILE`"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.setting_options import with_settings
from llmq.cli.terminal import interruptible, print_done, print_json, print_notes, print_table, quiet_transformers
from llmq.config import CONVERTIBLE, QuantConfig
from llmq.methods import METHODS
from llmq.numerics.scheme import BITS, GROUP_SIZES
from llmq.setting_fields import merged
from llmq.training.settings import TrainingSettings

if TYPE_CHECKING:
    from llmq.report.training import TrainingReport

PANEL, ORDER = "Quantization", 3
START = "Start, for a float model"

Data = Annotated[
    list[str],
    Option(
        "--data", metavar="SOURCE",
        help="Text to train on, all of it: the sources of --calibration of llmq quantize. Repeatable.",
    ),
]  # fmt: skip
Original = Annotated[
    str | None,
    Option("--original", metavar="MODEL", help="For a quantized model: the float model that it was made from."),
]
Tracker = Annotated[
    str | None,
    Option(
        "--tracker", metavar="NAME",
        help="Send the losses to a tracker of accelerate: tensorboard, wandb, trackio, … Its package is needed.",
    ),
]  # fmt: skip
MethodOfStart = Annotated[
    str | None, options.choice("--method", tuple(METHODS), "Quantization method. Default: best.", panel=START)
]
Bits = Annotated[int | None, options.choice("--bits", BITS, "Bits per quantized value. Default: 4.", panel=START)]
GroupSize = Annotated[
    str | None,
    options.choice(
        "--group-size", (*GROUP_SIZES, "channel", "tensor"), "Columns that share a scale. Default: 128.", panel=START
    ),
]
Format = Annotated[
    str | None,
    options.choice("--format", CONVERTIBLE, "File format. Default: compressed-tensors.", panel=START),
]
Samples = Annotated[
    int | None, Option("--samples", min=1, help="Calibration sequences, of the same text.", rich_help_panel=START)
]


@with_settings(model=TrainingSettings)
def command(
    model: Annotated[str, Argument(help="A quantized model, or a float model: a folder or a Hub id.", metavar="MODEL")],
    out: Annotated[Path, Argument(help="The output folder.", metavar="OUT")],
    data: Data,
    original: Original = None,
    *,
    settings: TrainingSettings,
    tracker: Tracker = None,
    method: MethodOfStart = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    format: Format = None,
    samples: Samples = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:
    """Train the values of a quantized model on their grid, and write the same files.

    A float model is quantized first, with --data as calibration text.
    Scales and norms are trained, too. The loss on training text and on
    held-out text are shown side by side. The result is measured on held-out
    text; if it is worse than the start, the start is kept.

    An interrupted training continues when the same command is given again,
    with the same bytes. `torchrun --nproc-per-node 4 -m llmq train …` uses
    four GPUs, for a model that is quantized already.

    Examples:
      llmq train Qwen/Qwen3-0.6B out/ --bits 3 --data text.jsonl
      llmq train out-3bit/ out/ --original Qwen/Qwen3-0.6B --data text.jsonl
      llmq train out-3bit/ out/ --loss cross-entropy --data chats.jsonl

    Exit codes:
      0  success                   5    unusable text
      2  invalid settings          6    device not available
      3  unreadable model          7    output cannot be written
      4  unsupported model         130  interrupted

    See also:
      llmq quantize --method best  training in less memory, block by block
      llmq eval                    how much quality was lost
    """
    begin(model, quiet=quiet)
    from llmq.training.run import Training

    quiet_transformers()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it warns of tied weights at each checkpoint
    given = {"method": method, "bits": bits, "group_size": group_size, "format": format, "samples": samples}
    has_start = any(value is not None for value in given.values())
    start = merged(QuantConfig(method="best"), given) if has_start else None
    with interruptible("repeat the command: it continues after the last validation"):
        training = Training(
            model, out, data, original=original, settings=settings, start=start, device=device, tracker=tracker,
            overwrite=overwrite, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        first = os.environ.get("RANK", "0") == "0"
        with ProgressDisplay(silent=quiet or not first, log=log_json if first else None) as display:
            report = training.run(display)
    if report is None:
        return
    print_notes(report.notes)
    print_done("finished already:" if training.finished else "done:", f" {out}")
    if json:
        print_json(report.to_dict())
    else:
        _print(report)


def _print(report: "TrainingReport") -> None:
    for table in report.tables():
        print_table(table.title, tuple(table.columns) or ("", "value"), [tuple(row) for row in table.rows])
