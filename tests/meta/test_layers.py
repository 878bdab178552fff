"""Who may import whom: a module knows those below it, never those above.

An import inside a function or under TYPE_CHECKING counts like any other: it is knowledge all the same.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Every file or folder directly in llmq/, lowest first.  A room imports from its own layer and the ones below; rooms of
# the layer in KEPT_APART import none of their neighbours, so that each can be read, tested and replaced alone.
LAYERS = (
    ("errors", "memory", "checkpoint", "_version"),
    ("numerics", "methods", "patterns", "setting_fields"),
    ("algorithms", "formats", "model"),
    ("config", "_keywords"),
    ("runtime", "calibration", "report", "gguf"),
    ("steps", "evaluation"),
    ("mixed_precision", "pipeline", "plan"),
    ("export", "verify", "run_text", "job"),
    ("cli",),
    ("__init__", "__main__"),  # the two doors
)
KEPT_APART = 2
MODEL_MAY_IMPORT = {"checkpoint", "errors", "memory", "numerics"}  # and itself: nothing of codes or settings

LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}


def room_of(file: Path) -> str:
    return _room(file.relative_to(ROOT / "llmq").with_suffix("").parts)


def _room(parts: Sequence[str]) -> str:
    """A file that has a place of its own, such as `gguf.blocks`, else what lies directly in llmq/."""
    inner = ".".join(parts[:2])
    return inner if inner in LAYER_OF else parts[0]


def imports(file: Path) -> Iterator[str]:
    """The dotted name of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the files that do."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted((ROOT / "llmq").rglob("*.py")):
        for name in imports(file):
            package, *rest = name.split(".")
            if package == "llmq":
                target = _room(rest) if rest and _room(rest) in LAYER_OF else "__init__"
                found.setdefault((room_of(file), target), []).append(str(file.relative_to(ROOT)))
    return found


def test_every_room_has_a_place_in_the_table() -> None:
    assert {room_of(file) for file in (ROOT / "llmq").rglob("*.py")} == set(LAYER_OF)


def test_nothing_imports_from_above() -> None:
    upward = [edge for edge in edges() if LAYER_OF[edge[0]] < LAYER_OF[edge[1]]]
    assert not upward, {edge: edges()[edge] for edge in upward}


def test_algorithms_formats_and_model_never_import_each_other() -> None:
    apart = set(LAYERS[KEPT_APART])
    crossing = [(a, b) for a, b in edges() if a != b and {a, b} <= apart]
    assert not crossing, {edge: edges()[edge] for edge in crossing}


def test_model_imports_nothing_but_errors_and_statistics() -> None:
    assert {b for a, b in edges() if a == "model"} <= {"model", *MODEL_MAY_IMPORT}


def circles(below: Mapping[str, set[str]]) -> list[str]:
    """Everything that imports itself on the way through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in below.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    return [name for name in below if name in reachable(name)]


def test_rooms_do_not_import_in_circles() -> None:
    below: dict[str, set[str]] = {}
    for a, b in edges():
        if a != b:
            below.setdefault(a, set()).add(b)
    assert circles(below) == []


def module_edges() -> dict[str, set[str]]:
    """Module of llmq -> the modules that it names in imports; a package is its `__init__`."""
    files = {_dotted(file): file for file in (ROOT / "llmq").rglob("*.py")}
    below: dict[str, set[str]] = {}
    for module, file in files.items():
        named = {name if name in files else name.rpartition(".")[0] for name in imports(file)}
        below[module] = {name for name in named if name in files} - {module}
    return below


def _dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_modules_do_not_import_in_circles() -> None:
    """Inside a room either; imports in functions and under TYPE_CHECKING count."""
    assert circles(module_edges()) == []


def test_a_circle_of_modules_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_the_kernels_never_import_llmq() -> None:
    files = sorted((ROOT / "kernels" / "llmq_kernels").rglob("*.py"))
    assert files
    assert [str(file) for file in files for name in imports(file) if name.split(".")[0] == "llmq"] == []
