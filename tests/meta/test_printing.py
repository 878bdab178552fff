"""Everything that llmq prints goes through `llmq/cli/streams.py`, which escapes control characters."""

import ast
from pathlib import Path

import pytest

LLMQ = Path(__file__).resolve().parents[2] / "llmq"
STREAMS = LLMQ / "cli" / "streams.py"
CONSOLES = LLMQ / "cli" / "terminal.py"  # has the only subclass of rich's console, and makes all consoles


@pytest.mark.parametrize("file", sorted(LLMQ.rglob("*.py")), ids=lambda file: str(file.relative_to(LLMQ)))
def test_only_streams_print(file: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    assert "Console" not in names
    assert file == STREAMS or "print" not in names
    assert file == CONSOLES or "SafeConsole" not in names
    written = {ast.unparse(call) for call in calls if isinstance(call, ast.Attribute) and call.attr == "write"}
    assert written & {"sys.stdout.write", "sys.stderr.write"} == set()
