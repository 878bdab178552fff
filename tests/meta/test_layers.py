"""Which module may import which: only modules of the same and of lower layers.

Imports inside functions or under TYPE_CHECKING count too, because they are dependencies as well.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Every part of llmq (a file or folder directly in llmq/), the lowest layer first.  A part imports from the same layer
# and from lower ones; the parts of layer KEPT_APART do not import each other, so each can be tested and replaced alone.
LAYERS = (
    ("errors", "memory", "checkpoint", "distributed", "_version"),
    ("numerics", "methods", "patterns", "setting_fields", "source_names"),
    ("algorithms", "formats", "model"),
    ("config", "calibration_settings", "_keywords"),
    ("runtime", "calibration", "report", "gguf", "cost"),
    ("steps", "evaluation"),
    ("mixed_precision", "pipeline", "run_plan"),
    ("export", "verification", "run_text", "schedule", "job", "forecast", "engines"),
    ("training", "_quantize"),
    ("cli",),
    ("__init__", "__main__"),  # the entry points
)
KEPT_APART = 2
MODEL_MAY_IMPORT = {"checkpoint", "distributed", "errors", "memory", "numerics"}  # and itself: no algorithms, settings

LAYER_OF = {part: layer for layer, names in enumerate(LAYERS) for part in names}


def part_of(file: Path) -> str:
    return _part(file.relative_to(ROOT / "llmq").with_suffix("").parts)


def _part(parts: Sequence[str]) -> str:
    """A file with a separate layer, such as `gguf.blocks`, otherwise the file or folder directly in llmq/."""
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
    """(part, part that it imports) -> the files with the imports."""
    files: dict[tuple[str, str], list[str]] = {}
    for file in sorted((ROOT / "llmq").rglob("*.py")):
        for name in imports(file):
            package, *rest = name.split(".")
            if package == "llmq":
                target = _part(rest) if rest and _part(rest) in LAYER_OF else "__init__"
                files.setdefault((part_of(file), target), []).append(str(file.relative_to(ROOT)))
    return files


def test_every_part_is_in_the_table() -> None:
    assert {part_of(file) for file in (ROOT / "llmq").rglob("*.py")} == set(LAYER_OF)


def test_no_import_from_a_higher_layer() -> None:
    upward = [edge for edge in edges() if LAYER_OF[edge[0]] < LAYER_OF[edge[1]]]
    assert not upward, {edge: edges()[edge] for edge in upward}


def test_algorithms_formats_and_model_never_import_each_other() -> None:
    apart = set(LAYERS[KEPT_APART])
    crossing = [(a, b) for a, b in edges() if a != b and {a, b} <= apart]
    assert not crossing, {edge: edges()[edge] for edge in crossing}


def test_model_imports_only_the_listed_parts() -> None:
    assert {b for a, b in edges() if a == "model"} <= {"model", *MODEL_MAY_IMPORT}


def circles(below: Mapping[str, set[str]]) -> list[str]:
    """The names that import themselves through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in below.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    return [name for name in below if name in reachable(name)]


def test_parts_have_no_circular_imports() -> None:
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


def test_modules_have_no_circular_imports() -> None:
    """Also within a part; imports in functions and under TYPE_CHECKING count."""
    assert circles(module_edges()) == []


def test_circular_imports_are_detected() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_the_kernels_never_import_llmq() -> None:
    files = sorted((ROOT / "kernels" / "llmq_kernels").rglob("*.py"))
    assert files
    assert [str(file) for file in files for name in imports(file) if name.split(".")[0] == "llmq"] == []
