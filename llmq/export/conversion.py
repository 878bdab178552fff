"""`Conversion`: the result of converting a checkpoint, and whether an equal conversion has produced it before."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq._version import __version__
from llmq.checkpoint.sealed import sha256_of
from llmq.checkpoint.writer import Writer
from llmq.export.finished import finished_record, require_unchanged
from llmq.report.shown import Shown, Table, megabytes

WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")


def conversion_identity(to: str, source: Any, **options: Any) -> dict[str, Any]:
    """What decides about the bytes of a converted model; `source` describes the source by plain values."""
    return {"llmq": __version__, "convert": to, "source": source, **options}


@contextmanager
def writing(out: Path, identity: Mapping[str, Any], *, overwrite: bool, needed_bytes: int) -> Iterator[Writer]:
    """The writer of a conversion; after an error, a conversion with the same identity continues. See `Writer.open`."""
    writer = Writer.open(out, identity=identity, overwrite=overwrite, needed_bytes=needed_bytes)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


@dataclass
class Conversion(Shown):
    """The result of a conversion.

    compared, differ  number of weights whose floats were compared with the source bit for bit, and number that differ
    requantized       ‖W - Ŵ‖ / ‖W‖ of each re-quantized weight
    request           the SHA-256 of what was requested
    finished          whether an equal conversion had written the output before
    """

    source: str
    output: str
    source_format: str
    format: str
    compared: int = 0
    differ: int = 0
    requantized: dict[str, float] = field(default_factory=dict)
    source_bytes: int = 0
    output_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    request: str = ""
    finished: bool = False

    def is_done(self, out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> bool:
        """Whether there is nothing to do, because `out` has the result of a conversion with this identity.

        Raises ConfigError if `out` holds something else, unless `overwrite`.
        """
        self.request = sha256_of(identity)
        if overwrite:
            return False
        if self.is_finished():
            return True
        Writer.require_free(out)
        return False

    def is_finished(self) -> bool:
        """Whether the output folder holds the model of this conversion; if it does, take over its record.

        Raises CheckpointError if its files have changed.
        """
        folders = [Path(self.output)]
        record = finished_record(folders, self.request)
        if record is None:
            return False
        require_unchanged(folders[0], folders)
        done = record["conversions"][-1]
        self.compared, self.differ, self.requantized = done["compared"], done.get("differ", 0), done["requantized"]
        self.finished = True
        self.output_bytes = sum(file.stat().st_size for file in folders[0].iterdir() if file.suffix in WEIGHTS)
        return True

    def tables(self) -> Iterator[Table]:
        """What was written and compared."""
        rows = [
            ("format", f"{self.source_format} → {self.format}"),
            ("size of weights", f"{megabytes(self.source_bytes)} → {megabytes(self.output_bytes)}"),
            ("unchanged", f"{self.compared} weights compared, {self.differ} differ"),
            *([("re-quantized", f"{len(self.requantized)} weights")] if self.requantized else []),
        ]
        yield Table(f"{self.source} → {self.output}", rows)

    def remarks(self) -> list[str]:
        """The notes."""
        return self.notes

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def record_of(report: Conversion, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the run that quantized the model, empty if there is none, and of all conversions since."""
    done = {
        "from": report.source_format,
        "to": report.format,
        "source": report.source,
        "llmq": __version__,
        "compared": report.compared,
        "differ": report.differ,
        "requantized": report.requantized,
        "run": record.get("request"),
    }
    return {**record, "conversions": [*record.get("conversions", ()), done], "request": report.request}
