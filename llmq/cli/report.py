"""`llmq report OUT`"""

from pathlib import Path
from typing import Annotated

from typer import Argument

from llmq.cli.paths import begin
from llmq.cli.terminal import print_done

PANEL, ORDER = "Inspect", 5


def command(
    out: Annotated[
        Path, Argument(help="The folder of a model that llmq has quantized, or of several formats.", metavar="OUT")
    ],
) -> None:
    """Write the report of a finished run again: report.html, report.json and layers.csv.

    llmq quantize writes them, too. They are made from llmq.json in the same folder; no weight is read. While
    a run goes on, OUT/.llmq-partial/report.html shows its state.

    Examples:
      llmq report out/

    Exit codes:
      0  success
      3  no llmq.json, or one that is damaged
      7  the folder cannot be written

    See also:
      llmq inspect  the same record as tables in the terminal
    """
    begin()
    from llmq.checkpoint import PROVENANCE_FILE
    from llmq.report import pages
    from llmq.report.stored_record import read_report

    several = [] if (out / PROVENANCE_FILE).is_file() else sorted(out.glob(f"*/{PROVENANCE_FILE}"))
    for folder in [record.parent for record in several] or [out]:
        pages.write(folder, read_report(folder))
        print_done("report:", f" {folder / pages.HTML}")
