"""`llmq train MODEL OUT --data FILE`"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import print_done, print_json, print_notes, print_table, quiet_transformers
from llmq.config import QuantConfig
from llmq.errors import Interrupted
from llmq.methods import METHODS
from llmq.numerics.scheme import BITS, GROUP_SIZES
from llmq.setting_fields import merged, read_toml

if TYPE_CHECKING:
    from llmq.report.training import TrainingReport

START, STEPS = "Start, for a float model", "Training"
GROUPS = (*GROUP_SIZES, "channel", "tensor")

PANEL, ORDER = "Quantization", 3


def command(
    model: Annotated[str, Argument(help="A quantized model, or a float model: a folder or a Hub id.", metavar="MODEL")],
    out: Annotated[Path, Argument(help="The output folder.", metavar="OUT")],
    data: Annotated[
        list[str],
        Option(
            "--data",
            metavar="SOURCE",
            help="Text to train on, all of it: the sources of --calibration of llmq quantize. Repeatable.",
        ),
    ],
    original: Annotated[
        str | None,
        Option("--original", metavar="MODEL", help="For a quantized model: the float model that it was made from."),
    ] = None,
    loss: Annotated[
        str,
        options.choice(
            "--loss",
            ("kl", "cross-entropy"),
            "kl brings the predictions back to those of the original; cross-entropy fine-tunes on the text.",
            panel=STEPS,
        ),
    ] = "kl",
    steps: Annotated[int, Option("--steps", min=1, help="Steps of the optimizer.", rich_help_panel=STEPS)] = 400,
    learning_rate: Annotated[
        float,
        Option(
            "--learning-rate",
            rich_help_panel=STEPS,
            help="The highest learning rate; it falls to zero. In steps of the grid, so it suits all models.",
        ),
    ] = 1e-3,
    batch_size: Annotated[
        int, Option("--batch-size", min=1, help="Sequences per step, of all processes.", rich_help_panel=STEPS)
    ] = 4,
    sequence_length: Annotated[
        int, Option("--sequence-length", min=2, help="Tokens per sequence.", rich_help_panel=STEPS)
    ] = 512,
    accumulate: Annotated[
        int,
        Option(
            "--accumulate",
            min=1,
            rich_help_panel=STEPS,
            help="Split each batch into this many parts, which takes less memory and more time.",
        ),
    ] = 1,
    activation_checkpointing: Annotated[
        bool,
        Option(
            "--activation-checkpointing",
            rich_help_panel=STEPS,
            help="Recompute activations in the backward pass, which takes less memory and more time.",
        ),
    ] = False,
    mixed_precision: Annotated[
        str,
        options.choice(
            "--mixed-precision",
            ("auto", "no", "bf16", "fp16"),
            "The precision of products. auto is bf16 on a GPU that has it.",
            panel=STEPS,
        ),
    ] = "auto",
    evaluate_every: Annotated[
        int | None,
        Option(
            "--evaluate-every",
            min=1,
            rich_help_panel=STEPS,
            help="Steps between two validations, after which an interrupted training can continue. Default: 8 in all.",
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        Option(
            "--held-out",
            min=1,
            rich_help_panel=STEPS,
            help="Sequences to validate on. Default: one per 16, at most 64.",
        ),
    ] = None,
    seed: Annotated[
        int, Option("--seed", min=0, help="Random seed for the order of the text.", rich_help_panel=STEPS)
    ] = 0,
    tracker: Annotated[
        str | None,
        Option(
            "--tracker",
            metavar="NAME",
            rich_help_panel=STEPS,
            help="Send the losses to a tracker of accelerate: tensorboard, wandb, trackio, … Its package is needed.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        options.choice("--method", tuple(METHODS), "Quantization method. Default: fast.", panel=START),
    ] = None,
    bits: Annotated[
        int | None, options.choice("--bits", BITS, "Bits per quantized value. Default: 4.", panel=START)
    ] = None,
    group_size: Annotated[
        str | None, options.choice("--group-size", GROUPS, "Columns that share a scale. Default: 128.", panel=START)
    ] = None,
    format: Annotated[
        str | None, Option("--format", metavar="FORMAT", help="File format, one.", rich_help_panel=START)
    ] = None,
    samples: Annotated[
        int | None,
        Option("--samples", min=1, help="Calibration sequences, of the same text.", rich_help_panel=START),
    ] = None,
    config: options.Config = None,
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
    from llmq.training.settings import TrainingSettings

    quiet_transformers()
    settings = TrainingSettings(
        steps, learning_rate, batch_size, sequence_length, loss, accumulate, mixed_precision, evaluate_every, held_out,
        activation_checkpointing, seed,
    )  # fmt: skip
    given = {"method": method, "bits": bits, "group_size": group_size, "format": format, "samples": samples}
    has_start = config is not None or any(value is not None for value in given.values())
    below = QuantConfig.model_validate(read_toml(config)) if config else QuantConfig(method="fast")
    start = merged(below, given) if has_start else None
    try:
        training = Training(
            model, out, data, original=original, settings=settings, start=start, device=device, tracker=tracker,
            overwrite=overwrite, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        first = os.environ.get("RANK", "0") == "0"
        with ProgressDisplay(silent=quiet or not first, log=log_json if first else None) as display:
            report = training.run(display)
    except KeyboardInterrupt:
        hint = "repeat the command: it continues after the last validation"
        raise Interrupted("interrupted", hint=hint) from None
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
