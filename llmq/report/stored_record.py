"""Read llmq.json, the record of a run. It may be from another version of llmq, or from a stranger."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError


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
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"{place}: {first['msg']}" if place else first["msg"]) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    result: dict[str, Any] = record
    return result


def _unreadable(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is not a record of llmq: {why}", hint="remove it: the model runs without it")
