"""`llmq convert PATH OUT --to FORMAT`"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.progress import TaskID
from typer import Argument, Option

from llmq.cli import options
from llmq.cli.terminal import bars, megabytes, messages, print_json, print_notes, print_table, quiet_transformers
from llmq.config import CONVERTIBLE
from llmq.errors import ConfigError, Interrupted
from llmq.report.record import ConvertStep

if TYPE_CHECKING:
    from llmq.export.convert import Conversion

SHOWN = 12
LINES = 10  # that a conversion prints where there is no terminal

PANEL, ORDER = "Quantization", 2


def command(
    path: Annotated[str, Argument(help="A quantized model: a folder, a Hub id or a .gguf file.", metavar="PATH")],
    out: Annotated[Path, Argument(help="The output folder.", metavar="OUT")],
    to: Annotated[str, Option("--to", help=" | ".join(CONVERTIBLE) + ".")],
    allow_requantize: Annotated[
        bool,
        Option(
            "--allow-requantize",
            help="Round weights anew that the format cannot hold as they are; the error of each is shown.",
        ),
    ] = False,
    source: Annotated[
        str | None,
        Option(
            "--source",
            help="For a .gguf file: the model that it was made from, whose configuration and tokenizer are used.  "
            "Default: those beside the file.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Write a quantized model in another format, without rounding anything again.

    Every weight is read back and compared with what it was.  What the format cannot hold is refused, unless
    --allow-requantize is given.  An interrupted conversion continues when the same command is given again.

    Example:  llmq convert out/ out-gptq/ --to gptq
    """
    from llmq.checkpoint import hub
    from llmq.checkpoint.index import gguf_file
    from llmq.export.convert import Converter
    from llmq.export.from_gguf import GgufConverter

    quiet_transformers()
    converter: Converter | GgufConverter
    file = gguf_file(Path(path))
    if file is not None:
        like = None if source is None else hub.locate(source)
        converter = GgufConverter(file, out, to, like=like, allow_requantize=allow_requantize, overwrite=overwrite)
    else:
        if source is not None:
            raise ConfigError("--source is for .gguf files", hint="leave it out: all of it is in the folder")
        converter = Converter(
            path, out, to, allow_requantize=allow_requantize, overwrite=overwrite, remote_code=trust_remote_code
        )
    try:
        _show(converter.run())
    except KeyboardInterrupt:
        hint = "give the same command again: it continues where it stopped"
        raise Interrupted("interrupted", hint=hint) from None
    print_notes(converter.report.notes)
    messages().print(f"[bold green]done:[/] {escape(str(out))}", soft_wrap=True)
    if json:
        print_json(converter.report.to_dict())
    else:
        _print(converter.report)


def _show(work: Iterator[ConvertStep]) -> None:
    console = messages()
    if not console.is_terminal:
        for step in work:
            if step.done == step.total or step.done % max(1, step.total // LINES) == 0:
                print(f"{step.doing} {step.done}/{step.total}  {step.module}", file=sys.stderr, flush=True)
        return
    with bars(console) as progress:
        tasks: dict[str, TaskID] = {}
        for step in work:
            if step.doing not in tasks:
                tasks[step.doing] = progress.add_task("", total=step.total, doing=step.doing, unit="weights")
            progress.update(tasks[step.doing], completed=step.done, description=step.module)


def _print(report: "Conversion") -> None:
    if report.requantized:
        worst = sorted(report.requantized.items(), key=lambda item: -item[1])
        print_table("what rounding anew cost", ("weight", "error"), [(n, f"{e:.2%}") for n, e in worst[:SHOWN]])
    rows = [
        ("format", f"{report.source_format} → {report.format}"),
        ("size of weights", f"{megabytes(report.source_bytes)} → {megabytes(report.output_bytes)}"),
        ("kept as they were", f"{report.compared} tensors compared, {report.differ} differ"),
        *([("rounded anew", f"{len(report.requantized)} tensors")] if report.requantized else []),
        ("output", report.output),
    ]
    print_table("result", ("", "value"), rows)
