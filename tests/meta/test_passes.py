"""Only the listed loops run blocks, and forwards are observed only by hooks or by temporarily replaced `forward`s."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmq"

# The two loops, and two exceptions: one loads the whole model to generate text, one runs blocks on meta to count.
LOOPS = {
    "cost/outline.py": {"_observe"},
    "model/passes/forward.py": {"forward"},
    "model/passes/backward.py": {"backward"},
    "model/passes/generate.py": {"in_memory"},
}
RUNS_OR_LOADS = {"load", "fill", "run", "forward", "past"}

# They run a model on meta to find and to count its operations, without text and without weights.
SEES_ALL_OPERATIONS = "model/analyse/meta_run.py"
COUNTS_OPERATIONS = "cost/counting.py"
OTHER_WAYS = {
    "TorchFunctionMode", "TorchDispatchMode", "_getframe", "currentframe", "settrace", "setprofile", "greenlet", "fx",
    "register_module_forward_hook", "register_module_forward_pre_hook",
}  # fmt: skip
PATCHED = {"torch", "nn", "functional", "F", "Tensor"}


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield str(file.relative_to(PACKAGE)), ast.parse(file.read_text(encoding="utf-8"))


def iterates_over_blocks(iterable: ast.expr) -> bool:
    """`skeleton.blocks`, also reversed, enumerated or in a variable `blocks`; but not over its length."""
    if isinstance(iterable, ast.Call):
        name = iterable.func.id if isinstance(iterable.func, ast.Name) else ""
        return name in {"reversed", "enumerate", "zip", "list", "tuple", "iter"} and any(
            map(iterates_over_blocks, iterable.args)
        )
    if isinstance(iterable, ast.Subscript):
        return iterates_over_blocks(iterable.value)
    return (isinstance(iterable, ast.Attribute) and iterable.attr == "blocks") or (
        isinstance(iterable, ast.Name) and iterable.id == "blocks"
    )


def runs_or_loads(body: list[ast.AST], names: set[str]) -> bool:
    """Whether a block, one of `names`, is run or loaded: by a method, or by a function that is given it."""
    for node in (inner for outer in body for inner in ast.walk(outer)):
        if not isinstance(node, ast.Call):
            continue
        receiver = node.func.value if isinstance(node.func, ast.Attribute) else None
        if isinstance(receiver, ast.Name) and receiver.id in names:
            if isinstance(node.func, ast.Attribute) and node.func.attr in RUNS_OR_LOADS:
                return True
        elif any(isinstance(argument, ast.Name) and argument.id in names for argument in node.args):
            return True
    return False


def loops_over_blocks(tree: ast.AST) -> Iterator[str]:
    """The functions with loops over blocks in which blocks are run or loaded."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.For):
                loops = [(node.target, node.iter, list[ast.AST](node.body))]
            elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
                loops = [(loop.target, loop.iter, [node.elt, *loop.ifs]) for loop in node.generators]
            elif isinstance(node, ast.DictComp):
                loops = [(loop.target, loop.iter, [node.key, node.value]) for loop in node.generators]
            else:
                continue
            for target, iterable, body in loops:
                names = {inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)} - {"index", "i"}
                if iterates_over_blocks(iterable) and runs_or_loads(body, names):
                    yield function.name


def test_only_the_listed_loops_run_blocks() -> None:
    loops = {file: set(loops_over_blocks(tree)) for file, tree in parsed()}
    assert {file: functions for file, functions in loops.items() if functions} == LOOPS


def test_loops_over_blocks_are_detected() -> None:
    bodies = [
        "for block in skeleton.blocks: block.load()",
        "for index, block in enumerate(self.skeleton.blocks): visit(block)",
        "for block in reversed(blocks[1:]): block.run(call)",
        "states = [block.run(call) for block in skeleton.blocks]",
    ]
    others = [
        "for block in skeleton.blocks: block.free()",
        "names = [name for block in skeleton.blocks for name in block.linears]",
        "for index in range(len(skeleton.blocks)): read(index)",
        "for batch in text.batches(): block.run(batch)",
    ]
    for lines, names in ((bodies, ["f"]), (others, [])):
        for line in lines:
            assert list(loops_over_blocks(ast.parse(f"def f():\n    {line}"))) == names, line


def other_ways(tree: ast.AST) -> Iterator[str]:
    """The names by which code observes a forward in other ways than hooks of modules and replaced forwards."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name | ast.FunctionDef):
            names = [node.id if isinstance(node, ast.Name) else node.name]
        yield from OTHER_WAYS.intersection(names)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and _last(target.value) in PATCHED:
                    yield ast.unparse(target)


def _last(node: ast.expr) -> str:
    """The last name of `torch.nn.functional`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_forwards_are_observed_by_hooks_or_replacement_only() -> None:
    uses = {file: sorted(set(other_ways(tree))) for file, tree in parsed()}
    assert set(uses.pop(SEES_ALL_OPERATIONS)) >= {"TorchDispatchMode", "TorchFunctionMode"}
    assert uses.pop(COUNTS_OPERATIONS) == ["TorchDispatchMode"]
    assert {file: names for file, names in uses.items() if names} == {}


def test_other_ways_are_detected() -> None:
    for line in (
        "from torch.overrides import TorchFunctionMode",
        "import greenlet",
        "frame = sys._getframe(1)",
        "torch.nn.functional.linear = mine",
        "F.linear = mine",
    ):
        assert list(other_ways(ast.parse(line))), line
    for line in ("module.forward = mine", "handle = module.register_forward_pre_hook(hook)", "self.torch = 1"):
        assert not list(other_ways(ast.parse(line))), line
