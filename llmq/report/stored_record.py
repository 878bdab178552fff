"""Read llmq.json, the record of a run. It may be from another version of llmq, or from a stranger."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import write_text
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError
from llmq.report import pages
from llmq.report.record import Report


class _Part(BaseModel):
    """A part of the record: the keys that llmq reads; others may be there, too."""

    model_config = ConfigDict(strict=True)


class _Layer(_Part):
    name: str
    weight_error: float | None
    output_error: float | None


class _Block(_Part):
    layers: list[_Layer]


class _Text(_Part):
    """One source of the calibration text."""

    source: str
    windows: int
    sha256: str


class _Calibration(_Part):
    samples: int
    seqlen: int
    sources: list[str]
    sha256: str
    manifest: list[_Text] = []  # not written by earlier versions
    notes: list[str] = []


class _Settings(_Part):
    seed: int = 0


class _Record(_Part):
    blocks: list[_Block] = []
    calibration: _Calibration | None = None
    checksums: dict[str, str] = {}
    conversions: list[dict[str, Any]] = []
    settings: _Settings = _Settings()
    versions: dict[str, str | None] = {}


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record that llmq writes next to the weights; empty if another tool wrote them.

    Raises CheckpointError if a key that llmq reads has another type than llmq writes.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return {}
    with reading(path):
        data = path.read_bytes()
    try:
        record = json.loads(data)
        _Record.model_validate(record)
    except ValidationError as error:
        raise _unreadable(path, _first(error)) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    result: dict[str, Any] = record
    return result


def read_report(folder: Path) -> Report:
    """Read the record of a run of llmq. Raises CheckpointError if there is none, or if it is damaged."""
    path, record = folder / PROVENANCE_FILE, read_record(folder)
    if not record:
        raise CheckpointError(f"{folder} has no {PROVENANCE_FILE}", hint="give the folder of a model that llmq made")
    try:
        return TypeAdapter(Report).validate_python(record)
    except ValidationError as error:
        raise _unreadable(path, _first(error)) from None


def known_report(record: Mapping[str, Any]) -> Report | None:
    """The report of the run in a record; None if another tool quantized the model, or another version of llmq."""
    try:
        return TypeAdapter(Report).validate_python(record)
    except ValidationError:
        return None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run next to its finished model, after the report for people that is made from it.

    So a record with a verdict says that everything before it was written.
    """
    pages.write(folder, Report.from_dict(record))
    write_text(folder / PROVENANCE_FILE, json_text(record))


def _first(error: ValidationError) -> str:
    """The first error, with its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _unreadable(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is not a record of llmq: {why}", hint="remove it: the model runs without it")
