"""`llmq.verify`: is a model complete, and which engines load it?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import hub
from llmq.errors import CheckpointError
from llmq.report.events import OnEvent, Planned, ignore
from llmq.report.shown import Shown, Table, megabytes
from llmq.verification import engines
from llmq.verification.engines import Finding, Verdict
from llmq.verification.integrity import Integrity, examine

SHOWN = 8  # problems


@dataclass(frozen=True)
class Verification(Shown):
    """The result: `integrity` is None if no weights were read; no engines are checked for a broken model."""

    path: str
    integrity: Integrity | None
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def intact(self) -> bool:
        """Whether no problem was found."""
        return self.integrity is None or not self.integrity.problems

    def require_intact(self) -> None:
        """Raise CheckpointError if a problem was found."""
        if self.integrity is None or self.intact:
            return
        problems = self.integrity.problems
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{self.path} is broken: {'; '.join(problems[:SHOWN])}{more}",
            hint="download or copy the files again; if you changed one, remove its line from checksums in llmq.json",
        )

    def tables(self) -> Iterator[Table]:
        """Problems or what was checked, and the engines."""
        if not self.intact and self.integrity is not None:
            yield Table(f"{self.path} is broken", [(problem,) for problem in self.integrity.problems])
            return
        if self.integrity is not None:
            yield Table("the model is complete", integrity_rows(self.integrity))
        yield Table("compatible engines", [engine_row(verdict) for verdict in self.verdicts], ENGINE_COLUMNS)

    def remarks(self) -> Sequence[str]:
        """The notes of the check, and the findings about engines."""
        notes = self.integrity.notes if self.integrity is not None else []
        return [*notes, *(f"{finding.engine}: {finding.text}" for finding in self.findings)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `llmq verify --json` prints."""
        loading = {verdict.engine: {"loads": verdict.loads, "gpus": verdict.gpus} for verdict in self.verdicts}
        checked = None if self.integrity is None else self.integrity.to_dict()
        return {"integrity": checked, "engines": loading, "findings": [finding.to_dict() for finding in self.findings]}


ENGINE_COLUMNS = ("engine", "loads it", "GPUs (tensor parallelism)")


def verify(
    path: str | Path, *, quick: bool = False, trust_remote_code: bool = False, on_event: OnEvent = ignore
) -> Verification:
    """Check that a model is complete, and which engines would load it.

        print(llmq.verify("out"))

    Every tensor is read, unless `quick`. Problems of the model are in the result; CheckpointError is raised if `path`
    is not a model.
    """
    model = hub.locate(str(path), None, remote_code=trust_remote_code)
    on_event(Planned({"reading": 1.0}))
    integrity = None if quick else examine(model, remote_code=trust_remote_code, on_event=on_event)
    broken = integrity is not None and integrity.problems
    findings = [] if broken else engines.check(model)
    verdicts = [] if broken else engines.verdicts(findings)
    return Verification(str(path), integrity, tuple(findings), tuple(verdicts))


def integrity_rows(integrity: Integrity) -> list[tuple[str, str]]:
    """What was checked."""
    read = [
        ("packed weights", f"{integrity.packed}, all unpacked without error"),
        ("other tensors", f"{integrity.tensors}, all finite"),
    ]
    return [
        *(read if integrity.packed or integrity.tensors else []),  # of an ONNX graph no tensor is read
        ("checksums", f"{integrity.checksums} files match" if integrity.checksums else "none recorded"),
        ("size of weights", megabytes(integrity.nbytes)),
    ]


def engine_row(verdict: Verdict) -> tuple[str, str, str]:
    """The engine; yes, no or unknown; the numbers of GPUs."""
    gpus = ", ".join(map(str, verdict.gpus)) or "-"
    return verdict.engine, {True: "yes", False: "no", None: "unknown"}[verdict.loads], gpus
