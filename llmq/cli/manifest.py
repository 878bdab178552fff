"""The manifest of a calibration text as a table: one column per source; empty lines are left out."""

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from llmq.cli.terminal import print_table

Record = Mapping[str, Any]

LINES: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("requested share", lambda record: f"{record['share']:.0%}"),
    ("sequences", lambda record: str(record["windows"])),
    ("tokens", lambda record: f"{record['tokens']:,}"),
    ("documents", lambda record: _unless_zero(record["documents"])),
    ("read", lambda record: _unless_zero(record["read"])),
    ("not needed", lambda record: _unless_zero(_not_needed(record))),
    ("unusable, left out", lambda record: _unless_zero(record.get("unusable", 0))),
    ("empty, left out", lambda record: _unless_zero(record["empty"])),
    ("duplicates, left out", lambda record: _unless_zero(record["duplicates"])),
    ("refused by the chat template", lambda record: _unless_zero(record["refused"])),
    ("read in part", lambda record: _unless_zero(record["truncated"])),
    ("tokens not used", lambda record: _unless_zero(record["dropped_tokens"])),
    ("doubled BOS, removed", lambda record: _unless_zero(record["doubled_bos"])),
    ("chats", lambda record: _unless_zero(record["chats"])),
    ("chats without a template", lambda record: _unless_zero(record["untemplated"])),
    ("chats without images etc.", lambda record: _unless_zero(record.get("partial", 0))),
    ("characters per token", lambda record: f"{record['characters_per_token']:.2f}"),
    ("scripts", lambda record: ", ".join(f"{name} {part:.1%}" for name, part in record["scripts"].items())),
    ("sha256", lambda record: f"{record['sha256'][:16]}…"),
)
OF_SEVERAL = ("requested share", "sha256")  # of one source they say nothing, or repeat the title


def print_manifest(calibration: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of `CalibrationSet.to_dict`, which llmq.json also holds; on stdout by default."""
    records = calibration.get("manifest", ())
    lines = [(name, cell) for name, cell in LINES if len(records) > 1 or name not in OF_SEVERAL]
    rows = [(name, *(_shown(cell, record) for record in records)) for name, cell in lines]
    title = f"calibration text: {calibration['samples']} x {calibration['seqlen']} tokens, sha256 "
    title += f"{calibration['sha256'][:16]}…"
    columns = ("", *(record["source"] for record in records))
    print_table(title, columns, [row for row in rows if any(row[1:])], console)


def _shown(cell: Callable[[Record], str], record: Record) -> str:
    """A cell; "?" where a record of another version of llmq has no such value."""
    try:
        return cell(record)
    except (LookupError, TypeError, ValueError, AttributeError):
        return "?"


def _unless_zero(count: int) -> str:
    return f"{count:,}" if count else ""


def _not_needed(record: Record) -> int:
    """The number of documents that no sequence needed."""
    reached = sum(record.get(what, 0) for what in ("read", "unusable", "empty", "duplicates", "refused"))
    return int(record["documents"] - reached)
