"""Imports of the kernels: references need NumPy, ops need torch, and only launches need Triton."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
PACKAGE = KERNELS / "llmq_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted({file.parent for file in FILES if file.name == "op.py"})


def named(file: Path) -> str:
    """llmq_kernels.w4a16.op, or the package for its __init__."""
    return ".".join(file.relative_to(KERNELS).with_suffix("").parts).removesuffix(".__init__")


def is_triton(name: str) -> bool:
    """Whether a module has Triton in its name."""
    return name.rpartition(".")[2].startswith("triton_")


def imports_anywhere(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules of kernels/ that it imports."""
    modules = {named(file): file for file in sorted(KERNELS.rglob("*.py"))}
    return {
        module: {part for name in imports_anywhere(file) for part in _prefixes(name) if part in modules} - {module}
        for module, file in modules.items()
    }


def imports_at_top(file: Path) -> Iterator[str]:
    """The dotted names that importing a file imports: those of all statements outside of functions."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_at_top(file)}


def run(program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_every_op_has_a_reference() -> None:
    assert {folder.name for folder in OPS} >= {"w4a16", "w4a16_experts", "gptq_block", "gram"}
    assert [folder.name for folder in OPS if not (folder / "reference.py").is_file()] == []


def test_only_files_named_for_triton_import_it() -> None:
    assert [named(file) for file in FILES if "triton" in packages(file) and not is_triton(named(file))] == []


def test_triton_files_are_imported_by_triton_files_only() -> None:
    """Other files import them inside the function that launches."""
    importing = {
        named(file): [name for name in imports_at_top(file) if any(is_triton(part) for part in _prefixes(name))]
        for file in FILES
        if not is_triton(named(file))
    }
    assert {name: names for name, names in importing.items() if names} == {}


def test_modules_have_no_circular_imports() -> None:
    """Module by module, not folder by folder: an import inside a function counts, since it is a dependency too."""
    graph = module_graph()
    assert len(graph) > len(FILES)  # bench included
    remaining = dict(graph)
    while free := {module for module, targets in remaining.items() if not targets & remaining.keys()}:
        remaining = {module: targets for module, targets in remaining.items() if module not in free}
    assert {module: sorted(targets & remaining.keys()) for module, targets in remaining.items()} == {}


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: stop + 1]) for stop in range(len(parts))]


@pytest.mark.parametrize("file", [f for f in FILES if f.name in ("__init__.py", "reference.py")], ids=named)
def test_packages_and_references_need_numpy_at_most(file: Path) -> None:
    assert packages(file) <= {"numpy", "llmq_kernels"} | sys.stdlib_module_names


def test_references_can_be_imported_without_torch() -> None:
    modules = ["llmq_kernels", *(named(file) for file in FILES if file.name == "reference.py")]
    run(
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None\n"  # an import of either now raises
        + "\n".join(f"import {module}" for module in modules)
    )


def test_everything_else_can_be_imported_without_triton() -> None:
    modules = [named(file) for file in FILES if not is_triton(named(file))]
    run(
        "import sys; sys.modules['triton'] = sys.modules['llmq'] = None\n"
        + "\n".join(f"import {module}" for module in modules)
    )
