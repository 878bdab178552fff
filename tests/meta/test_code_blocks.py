"""Every code block of the README and of docs/ is run, or parsed as the program would, or listed with a reason.

Blocks marked `<!-- runs -->` run on the bundled model, with less text (`LESS`). All other commands of llmq have names
instead of files, or need a GPU or the Hub: their options are parsed, and settings are checked. Python blocks are
compiled, and their calls of llmq are compared with its functions.
"""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import llmq
from llmq.config import QuantConfig
from llmq.setting_fields import settings_of
from tests.command_line import llmq as run_llmq
from tests.command_lines_in_text import SHELLS, code_blocks, command_lines, of_llmq, parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ENGINES = ("vllm", "sglang.launch_server", "llama-server", "llama-cli", "rpc-server", "mlx_lm.generate", "ray")
BUILDERS = ("onnxruntime_genai.models.builder", "litert-torch", "cp")
OTHER_PROGRAMS = {  # why they are not run
    **dict.fromkeys(ENGINES, "an engine, which is not installed for the tests"),
    **dict.fromkeys(BUILDERS, "another tool, which reads the result of llmq"),
    **dict.fromkeys(("pip", "git", "cd", "docker"), "the environment of the tests does the same"),
    **dict.fromkeys(("srun", "set", "scontrol", "torchrun"), "needs several machines, or is part of the shell"),
}
LESS = {  # the last one of an option counts
    "quantize": ["--method", "rtn", "--samples", "4", "--seqlen", "64", "--validate", "2", "--device", "cpu"],
    "eval": ["--windows", "2", "--seqlen", "64", "--device", "cpu"],
    "generate": ["--max-tokens", "2", "--device", "cpu"],
    "plan": ["--device", "cpu"],
}  # fmt: skip
BLOCKS = [
    (page, place, *block) for page in PAGES for place, block in enumerate(code_blocks(page.read_text("utf-8")), 1)
]


def of_kind(*languages: str) -> list[object]:
    return [pytest.param(language, text, id=f"{page.relative_to(ROOT)}-{place}")
            for page, place, language, text, _ in BLOCKS if language in languages]  # fmt: skip


def test_every_language_is_known() -> None:
    assert {language for _, _, language, _, _ in BLOCKS} <= {*SHELLS, "python", "text", "bibtex"}
    assert not [str(page) for page in PAGES if re.search(r"\n\n {4}(llmq|python|torchrun) ", page.read_text("utf-8"))]


@pytest.mark.parametrize(("language", "text"), of_kind(*SHELLS))
def test_commands_are_valid(language: str, text: str) -> None:
    for words in command_lines(language, text):
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if (arguments := of_llmq(words)) is not None:
            parse(arguments)
        elif words and words[0] in ("bash", "python") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), words
        elif words and not words[0].startswith("first="):
            program = words[2] if words[:2] == ["python", "-m"] else words[0]
            assert program in {*OTHER_PROGRAMS, "pytest"}, f"no reason why {program} is not run"


@pytest.mark.parametrize(("language", "text"), of_kind("python"))
def test_python_is_valid(language: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmq"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llmq":
            assert hasattr(llmq, node.attr), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("llmq."):
            function = getattr(llmq, ast.unparse(node.func).removeprefix("llmq."))
            named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(function).bind(*node.args, **named)
            settings = {name for name in named if name not in inspect.signature(function).parameters}
            assert settings <= set(settings_of(QuantConfig))


@pytest.mark.slow
def test_the_marked_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About six CPU seconds. `env`, `push` and other commands without a model have tests elsewhere."""
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    monkeypatch.chdir(tmp_path)
    for page, _, language, text, marked in BLOCKS:
        for words in command_lines(language, text) if marked else ():
            arguments = of_llmq(words)
            if arguments is None:
                _run_script(ROOT / words[1], words[2:], monkeypatch)
                continue
            outcome = run_llmq(*arguments, *LESS.get(arguments[0], ()))
            assert outcome.exit_code == 0, f"{page.name}: {' '.join(words)}\n{outcome.stderr}"
            assert outcome.stdout.strip()


def _run_script(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/stdlib_text.py FOLDER`, in this process."""
    monkeypatch.syspath_prepend(script.parent)
    assert script.name == "stdlib_text.py" and sys.modules.get(script.stem) is None
    importlib.import_module(script.stem).write_texts(Path(arguments[0]), evaluation_characters=20_000)
