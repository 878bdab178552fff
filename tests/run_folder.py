"""What is in the output folder of a run, to compare it with that of another run."""

import json
from pathlib import Path

from llmq.checkpoint import PAGE_FILES
from llmq.checkpoint.staging import STAGING

RECORD, REPORT = "llmq.json", "report.json"


def contents(folder: Path) -> dict[str, bytes]:
    """The visible files by their paths, with the times and sizes of memory taken out of llmq.json."""
    if not folder.exists():
        return {}
    files = [file for file in folder.rglob("*") if file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return {str(file.relative_to(folder)): _content(file) for file in files}


def _content(file: Path) -> bytes:
    if file.name == REPORT:
        return repr((json.loads(file.read_bytes())["verdict"] or {}).get("kl")).encode()
    if file.name in PAGE_FILES:  # made from the record, with its times
        return b""
    return without_times(file) if file.name == RECORD else file.read_bytes()


def without_times(file: Path) -> bytes:
    document = json.loads(file.read_bytes())
    for key in ("seconds", "peak_memory_bytes", "notes", "request"):  # a request has the times of the source files
        document.pop(key, None)
    for part in (*document.get("blocks", ()), document.get("tuning") or {}):
        for key in ("seconds", "resumed", "host_bytes", "device_bytes"):
            part.pop(key, None)
    return json.dumps(document, sort_keys=True).encode()


def state(out: Path) -> str:
    """What a kill has left: nothing, a number of blocks, tuning, a model that is being moved, or the end."""
    staging = next((folder for folder in out.rglob(STAGING)), None) if out.exists() else None
    if staging is None:
        return "after the end" if out.exists() and any(out.rglob("config.json")) else "before the first file"
    if (staging / "moving.json").exists():
        return "moving"
    if (staging / "final").exists():
        return "assembling"
    if (staging / "revision").exists():
        return "tuning"
    return "quantizing" if any(staging.glob("[0-9]*.json")) else "before the first block"
