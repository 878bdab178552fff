"""The pages of docs/reference, from the code: commands, settings, exit codes and the Python functions.

Also the outputs and figures in docs/TUTORIAL.md and docs/FIRST_RUN.md, from docs/FIRST_RUN.json (scripts/first_run.py).

`python scripts/docs.py` writes them.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOLDER = DOCS / "reference"
MADE = "Generated from the code by `python scripts/docs.py`."


def pages() -> Iterator[tuple[Path, str]]:
    yield FOLDER / "commands.md", commands()
    yield FOLDER / "settings.md", settings()
    yield FOLDER / "exit_codes.md", exit_codes()
    yield FOLDER / "python.md", python()
    steps = json.loads((DOCS / "FIRST_RUN.json").read_text(encoding="utf-8"))["steps"]
    yield DOCS / "TUTORIAL.md", with_parts(DOCS / "TUTORIAL.md", outputs(steps))
    lines = json.loads((DOCS / "FIRST_LINES.json").read_text(encoding="utf-8"))
    tables = {"steps": times(steps), "first lines": first_lines(lines)}
    yield DOCS / "FIRST_RUN.md", with_parts(DOCS / "FIRST_RUN.md", tables)


def with_parts(page: Path, parts: Mapping[str, str]) -> str:
    """A page with new text between the lines `<!-- begin: name -->` and `<!-- end: name -->` of every part."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, begin, rest = text.partition(f"<!-- begin: {name} -->\n")
        _, end, after = rest.partition(f"<!-- end: {name} -->")
        if not begin or not end:
            raise ValueError(f"{page.name} has no lines for the generated part {name!r}")
        text = f"{before}{begin}{part}\n{end}{after}"
    return text


def outputs(steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each command of llmq printed, by the name of the command."""
    named = {step["command"].split()[1]: step["output"] for step in steps if step["command"].startswith("llmq")}
    return {name: "\n".join(["```text", *(line.rstrip() for line in lines), "```"]) for name, lines in named.items()}


def times(steps: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/FIRST_RUN.md."""
    lines = ["| command | first line after | time | CPU time |", "|---|---:|---:|---:|"]
    for step in steps:
        first = f"{step['first_line_seconds']} s"
        lines.append(f"| `{cell(step['command'])}` | {first} | {step['seconds']} s | {step['cpu_seconds']} s |")
    return "\n".join(lines)


def first_lines(record: Mapping[str, Any]) -> str:
    """The table of the time until the first line, and how it was measured."""
    columns = ("seconds", "slowest", "cpu_seconds", "cold")
    rows = [f"| `llmq {row['command']}` | {' | '.join(f'{row[column]:.2f} s' for column in columns)} |"
            for row in record["commands"]]  # fmt: skip
    head = ["| command | seconds | slowest | CPU seconds | cold |", "|---|---:|---:|---:|---:|"]
    where = f"Measured on {record['date']}, {record['cores']} cores with a load average of {record['load']}."
    return "\n".join([*head, *rows, "", where])


def cell(text: object) -> str:
    """One cell of a table."""
    return " ".join(str(text).split()).replace("|", r"\|")


def plain(text: str) -> str:
    """Help text without the markup of rich."""
    return re.sub(r"\[/?dim\]", "", text).replace(r"\[", "[")


def commands() -> str:
    """`--help` of all commands; options that several commands share are repeated."""
    from llmq.cli import PANELS, every_command

    known = every_command()
    panels = {panel: [name for name, command in known.items() if command.rich_help_panel == panel]
              for panel in PANELS}  # fmt: skip
    links = [f"* {panel}: {', '.join(f'[{name}](#llmq-{name})' for name in named)}" for panel, named in panels.items()]
    parts = [f"# Commands\n\n{MADE} `llmq COMMAND --help` prints the same.", "\n".join(links)]
    for name, command in known.items():
        parts.append(f"## llmq {name}\n\n```text\n{inspect.cleandoc(command.help)}\n```")
        rows = [option_row(option) for option in command.params if option.name != "help"]
        parts.append("\n".join(["| argument or option | explanation |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def option_row(option: Any) -> str:
    names = [*option.opts, *getattr(option, "secondary_opts", ())]
    if option.param_type_name == "argument":
        names = [option.metavar or option.name.upper()]
    elif option.metavar and not getattr(option, "is_flag", False):
        names[-1] += f" {option.metavar}"
    shown = plain(option.help or "")
    if option.default not in (None, False, "", ()) and not callable(option.default) and "efault" not in shown:
        shown += f" [default: {option.default}]"
    return f"| {', '.join(f'`{cell(name)}`' for name in names)} | {cell(shown)} |"


def settings() -> str:
    """The settings of a run: key in a TOML file, flag, Python keyword."""
    from llmq.config import QuantConfig
    from llmq.setting_fields import WORDS, settings_of

    lines = [
        "# Settings",
        "",
        f"{MADE} A file for `--config` has the keys of the first column, and",
        "`llmq quantize --print-config` writes one. Flags override the file. Python functions take the names of the",
        "last column as keywords.",
        "",
        "| key in TOML | flag | values | default | Python keyword |",
        "|---|---|---|---|---|",
    ]
    explanations = []
    for name, setting in settings_of(QuantConfig).items():
        key = f"{setting.table}.{setting.key}" if setting.table else setting.key
        flag = setting.about.flag or "--" + name.replace("_", "-")
        kinds = " or ".join(WORDS.get(kind, "a list of strings") for kind in setting.types)
        values = ", ".join(map(str, setting.choices)) or setting.about.expected or kinds
        default = setting.field.default
        shown = "" if default in (None, ()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(f"| `{key}` | `{flag}` | {cell(values)} | {shown} | `{name}` |")
        explanations.append(f"| `{name}` | {cell(setting.field.description or '')} |")
    return "\n".join([*lines, "", "| setting | explanation |", "|---|---|", *explanations]) + "\n"


def exit_codes() -> str:
    """The exit codes, from the docstring of llmq/errors.py."""
    text = ast.get_docstring(ast.parse((ROOT / "llmq" / "errors.py").read_text(encoding="utf-8"))) or ""
    rows = [match.groups() for match in re.finditer(r"(\w+) {2,}(\S.*?) {2,}exit (\d+)", text)]
    lines = [
        "# Exit codes",
        "",
        f"{MADE} 0 is success. Messages go to stderr: what was found, what was",
        "expected, and what to try. In Python the same errors are exceptions, and `error.hint` is what to try.",
        "`--help` lists the codes of each command.",
        "",
        "| code | meaning | exception |",
        "|---:|---|---|",
        *(f"| {code} | {cell(meaning)} | `{name}` |" for name, meaning, code in rows),
        "| 1 | an error in llmq itself; please report it | `LlmqError`, any other |",
    ]
    return "\n".join(lines) + "\n"


def python() -> str:
    """Signatures and docstrings of the public names, read from the source without importing it."""
    import llmq

    parts = [f"# Python functions\n\n{MADE} [Python](../PYTHON.md) shows how to use them."]
    for name, module in sorted(llmq._HOMES.items(), key=lambda item: (item[0][0].isupper(), item[0])):
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        node = next(node for node in tree.body if getattr(node, "name", None) == name)
        assert isinstance(node, ast.FunctionDef | ast.ClassDef), f"{name} is neither a function nor a class"
        parts.append(
            f"## llmq.{name}\n\n```text\n{signature(node)}\n\n{ast.get_docstring(node) or ''}".rstrip() + "\n```"
        )
    return "\n\n".join(parts) + "\n"


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    short = f"{node.name}({ast.unparse(node.args)}){returned}"
    if len(short) <= 110:
        return short
    parameters = re.split(r", (?![^\[(]*[\])])", ast.unparse(node.args))
    return f"{node.name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returned}"
