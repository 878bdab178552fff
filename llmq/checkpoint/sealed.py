"""JSON documents of the staging folder, each with the SHA-256 of its contents, so that a damaged one is noticed.

{"sha256": "…", "document": {…}}
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.checkpoint.atomic import write_text


def sha256_of(document: Mapping[str, Any]) -> str:
    """The SHA-256 of a document that JSON can hold, in hexadecimal; equal for equal documents in any order of keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode("utf-8")).hexdigest()


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, completely or not at all. Raises StorageError."""
    plain = json.loads(json.dumps(document))  # as JSON returns it: lists for tuples, text for keys
    write_text(path, json.dumps({"sha256": sha256_of(plain), "document": plain}, indent=1))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Read a document; None if the file is missing, truncated by a power cut, or damaged."""
    try:
        sealed = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    match sealed:
        case {"sha256": str(recorded), "document": dict(document)} if sha256_of(document) == recorded:
            return document
    return None
