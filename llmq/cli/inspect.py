"""`llmq inspect PATH`"""

from typing import Any

from llmq.cli import options
from llmq.cli.manifest import print_manifest
from llmq.cli.paths import begin
from llmq.cli.terminal import print_json, print_notes, print_table, quiet_transformers
from llmq.report.shown import megabytes

PANEL, ORDER = "Inspect", 3


def command(path: options.Path_, quiet: options.Quiet = False, json: options.Json = False) -> None:
    """Show the contents of a model: layers, bits, sizes, quantization errors.

    The errors and the calibration text are those recorded by llmq quantize.

    Examples:
      llmq inspect out/
      llmq inspect out/ --json

    Exit codes:
      0  success
      3  unreadable model

    See also:
      llmq verify  is the model complete, and which engines load it
      llmq report  the same record as a page
    """
    begin(path, quiet=quiet)
    from llmq.verification.inspection import inspect

    quiet_transformers()
    report = inspect(path)
    if json:
        print_json(report.to_dict())
        return
    rows = [layer.row() for layer in report.layers]
    print_table(str(path), ("weight", "shape", "stored as", "bits/weight", "size", "error"), rows)
    summary: list[tuple[str, Any]] = [
        ("format", report.format or "not quantized"),
        ("size of weights", megabytes(report.file_bytes)),
        ("bits per quantized weight", "-" if report.bits_per_weight is None else f"{report.bits_per_weight:.3f}"),
        *((key, value) for key, value in report.provenance.items()),
    ]
    print_table("summary", ("", "value"), [(key, str(value)) for key, value in summary])
    print_notes(report.notes)
    if report.calibration and report.calibration.get("manifest"):  # not written by earlier versions
        print_manifest(report.calibration)
        print_notes(report.calibration["notes"])
