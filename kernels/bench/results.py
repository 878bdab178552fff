"""The result file of one GPU and day: sections merged, written atomically, read by the tables.

    {"format": 1, "name": "NVIDIA H200", "date": "2026-11-23",
     "sections": {"w4a16": {"status": "done", "plan": "full", "seconds": 188.2, "sources": "…", "records": [...]}}}

`status` is done, out of time or failed; records of a section that did not end are kept.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.session import Result

FORMAT = 1
PUBLISHED = "full"  # the plan whose figures are published
TRIALS = ("-smoke", "-interpret")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "results"


def file_name(device: str, plan: str, date: str) -> str:
    """`nvidia-h200-2026-11-23.json`, or for another plan than the full one `nvidia-h200-smoke-2026-11-23.json`."""
    slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{date}.json" if plan == PUBLISHED else f"{slug}-{plan}-{date}.json"


def merge(path: Path, device: str, date: str, section: str, entry: Result) -> None:
    """Write a section into the file, replacing the same section; the file is never half written."""
    content: dict[str, Any] = {"format": FORMAT, "name": device, "date": date, "sections": {}}
    if path.is_file():
        content = read(path)
    content["sections"][section] = entry
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A result file; raises ValueError for one of another format."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT or "sections" not in content:
        raise ValueError(f"{path.name}: found format {content.get('format')!r}, expected {FORMAT}")
    return content


def gpu_files(folder: Path = FOLDER) -> list[Path]:
    """The newest result file of each GPU, by name, without trials and CPUs."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem[-10:]):
        device = path.stem[:-11]
        if not path.name.startswith("cpu-") and not device.endswith(TRIALS):
            newest[device] = path
    return [newest[device] for device in sorted(newest)]


def cpu_files(folder: Path = FOLDER) -> list[Path]:
    """The result files that `bench.cpu` and `bench.cpu_decode` write."""
    return sorted(folder.glob("cpu-*.json"))


def sources() -> str:
    """Twelve hexadecimal digits that identify the version of the kernels, where git is not available."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "kernels" / "llmq_kernels").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def cases(content: Mapping[str, Any], section: str) -> dict[str, Result]:
    """case -> result of a section; empty if it was not run."""
    records = content["sections"].get(section, {}).get("records", [])
    return {record["case"]: record["result"] for record in records if record["kind"] == "result"}


def errors(content: Mapping[str, Any], section: str) -> list[Result]:
    """The records of cases that raised an error or ended the process."""
    return [record for record in content["sections"].get(section, {}).get("records", []) if record["kind"] == "error"]


def problems(content: Mapping[str, Any], section: str) -> list[str]:
    """The problems of a section: wrong results, errors, and a process that died or hung."""
    entry = content["sections"].get(section)
    if entry is None:
        return []
    problems = [] if entry["status"] in ("done", "out of time") else [f"the section {entry['status']}"]
    problems += [f"{record['case']}: {record['error']}" for record in errors(content, section)]
    for case, result in cases(content, section).items():
        if result.get("wrong"):
            problems.append(f"{case}: {result.get('summary', 'wrong')}")
    return problems
