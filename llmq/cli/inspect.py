"""`llmq inspect PATH`"""

from typing import Any

from llmq.cli import options
from llmq.cli.manifest import print_manifest
from llmq.cli.terminal import megabytes, print_json, print_table

PANEL, ORDER = "Inspect", 3


def command(path: options.Path_, json: options.Json = False) -> None:
    """Show the contents of a model: layers, bits, sizes, quantization errors.

    The errors and the calibration text are those recorded by llmq quantize.

    Example:
      llmq inspect out/
    """
    from llmq.verify.inspection import inspect

    found = inspect(path)
    if json:
        print_json(found.to_dict())
        return
    rows = [
        (
            layer.name,
            f"{layer.out_features} x {layer.in_features}",
            layer.scheme or layer.dtype,
            f"{layer.bits_per_weight:.3f}",
            megabytes(layer.nbytes),
            "-" if layer.error is None else f"{layer.error:.2%}",
        )
        for layer in found.layers
    ]
    print_table(str(path), ("weight", "shape", "stored as", "bits/weight", "size", "error"), rows)
    summary: list[tuple[str, Any]] = [
        ("format", found.format or "not quantized"),
        ("size of weights", megabytes(found.file_bytes)),
        ("bits per quantized weight", "-" if found.bits_per_weight is None else f"{found.bits_per_weight:.3f}"),
        *((key, value) for key, value in found.provenance.items()),
    ]
    print_table("in all", ("", "value"), [(key, str(value)) for key, value in summary])
    if found.calibration and found.calibration.get("manifest"):  # earlier versions left none
        print_manifest(found.calibration)
        for note in found.calibration["notes"]:
            print(f"note: {note}")
