"""Whether an output folder already holds the finished model of a command: the same command then has nothing to do.

llmq.json has the hash of the request that made the model, and the checksums of the files. A folder that was made by the
same request is finished if its files are unchanged; anything else in it is refused as before.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmq.checkpoint import PAGE_FILES, PROVENANCE_FILE
from llmq.checkpoint.atomic import discard_partial
from llmq.checkpoint.confined import confined
from llmq.checkpoint.side_files import CARD
from llmq.checkpoint.writer import CONFIG, Writer
from llmq.errors import CheckpointError, ConfigError, listed
from llmq.numerics.gguf_types import GGUF
from llmq.report.record import Report
from llmq.report.stored_record import read_record
from llmq.verification.integrity import checksum


def finished_report(out: Path, folders: Sequence[Path], request: str, text: Callable[[], str] | None) -> Report | None:
    """The report of the model in `folders`, one per format in `out`, if the request with this hash made all of them.

    `text` gives the SHA-256 of the calibration text; None if that depends on the request only, as text that the model
    generates does. Raises CheckpointError if a file has changed.
    """
    record = finished_record(folders, request)
    if record is None:
        return None
    if record["calibration"] is not None and text is not None and text() != record["calibration"]["sha256"]:
        return None
    require_unchanged(out, folders)
    return Report.from_dict(record)


def finished_record(folders: Sequence[Path], request: str) -> dict[str, Any] | None:
    """The record of the model in the first of these folders, if all of them were made by the request with this hash.

    Its checksums are those of all folders. Raises ConfigError if one of several formats could not be written.
    """
    records = [read_record(folder) if (folder / CONFIG).is_file() else {} for folder in folders]
    made = [folder for folder, record in zip(folders, records, strict=True) if request in _requests(record)]
    missing = [folder for folder in folders if folder not in made]
    if made and not any(folder.exists() for folder in missing) and missing:
        raise ConfigError(
            f"{made[0].parent} holds the formats {listed(folder.name for folder in made)} of this command, but "
            f"{listed(folder.name for folder in missing)} could not be written",
            hint=next_steps(made, missing),
        )
    if missing:
        return None
    if len(folders) == 1:
        return records[0]
    checksums = {f"{folder.name}/{name}": sha for folder in folders for name, sha in _checksums(folder).items()}
    return {**records[0], "checksums": checksums}


def _requests(record: Mapping[str, Any]) -> list[Any]:
    """The requests that made a model: of a run, and for a converted model, also of the run before it."""
    exact = (conversion for conversion in record.get("conversions", ()) if not conversion.get("requantized"))
    return [record.get("request"), *(conversion.get("run") for conversion in exact)]


def next_steps(made: Sequence[Path], missing: Sequence[Path]) -> str:
    """A hint: the formats that were written, and the commands that convert the first one to the missing formats."""
    source = next((folder for folder in made if folder.name != GGUF), made[0])
    commands = [shlex.join(["llmq", "convert", str(source), str(to), "--to", to.name]) for to in missing]
    names, out = listed(folder.name for folder in made), source.parent
    return f"{names} were written to {out}; write the rest without quantizing: {' and '.join(commands)}"


def require_unchanged(out: Path, folders: Sequence[Path]) -> None:
    """Raise CheckpointError if a file of a finished model has changed; delete what a killed process has left there."""
    for folder in folders:
        for name, expected in _checksums(folder).items():
            file = confined(folder, name)
            if file is None or not file.is_file() or checksum(file) != expected:
                message = f"{out} holds the finished model of this command, but {name} is missing or has changed"
                raise CheckpointError(message, hint="--overwrite makes the model again")
    for file in (folder / name for folder in folders for name in (PROVENANCE_FILE, *PAGE_FILES, CARD)):
        discard_partial(file)  # these are written again in the finished folder, after the measurement
    Writer.clean(out)


def _checksums(folder: Path) -> Mapping[str, Any]:
    recorded = read_record(folder).get("checksums")
    if not isinstance(recorded, dict) or not recorded:
        raise CheckpointError(f"{folder / PROVENANCE_FILE} has no checksums", hint="--overwrite makes the model again")
    return recorded
