"""Plain technical English in everything that a person reads: documents, help texts, docstrings, comments, messages.

`HABITS` lists phrases that readers of this project stumbled over, each with the phrase to use instead.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmq.cli import app, every_command

ROOT = Path(__file__).resolve().parents[2]
MAIN_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [
    *MAIN_PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels" / "README.md",
    ROOT / "eval" / "README.md",
    ROOT / "eval" / "LOG.md",
    *sorted((ROOT / "eval" / "models").glob("*/README.md")),
]
CODE_FOLDERS = ("llmq", "kernels", "tests", "eval", "scripts")
NAMES = ("found", "each")  # variables that do not say what they hold
COMMANDS = ("", "quantize", "train", "merge", "convert", "push", "eval", "verify", "inspect", "plan", "sensitivity",
            "report", "generate", "chat", "bench", "serve", "env")  # fmt: skip

LONGEST_SENTENCE = 40  # words
README_LINES = 190  # the aim is 180
FIRST_SCREEN = 30  # lines
MESSAGE_WORDS = 3  # shorter string constants are names, keys and templates

COUNTED = (
    r"(?:bits?|bytes?|tokens|[KMG]B|ms|µs|seconds?|scales?|zeros?|forwards?|documents?|once|twice|times|passes"
    r"|(?:an?|one|two|three|four|\d+(?:[.,]\d+)?) [a-z-]+)"
)
UNIT = (
    r"(?:weight|second|minute|hour|token|row|column|layer|block|step|batch|file|line|folder|format|module|command"
    r"|process|device|run|op|window|expert|group|GPU|channel|model|launch|call|head|word|shard|input|output|matrix)"
)


@dataclass(frozen=True)
class Habit:
    """A phrase to avoid: `pattern` finds it (a space stands for any white space), `instead` says what to write.

    `example` is caught, `plain` is not.
    """

    pattern: str
    instead: str
    example: str
    plain: str

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        return re.finditer(self.pattern.replace(" ", r"\s+"), text)


HABITS = (
    Habit(rf"\b{COUNTED} an? {UNIT}\b", "per", "4.5 bits a weight", "4.5 bits per weight"),
    Habit(r"(?<![Tt]here\s)(?:\bis|\bare|\bwas|\bwere) no (?!longer|more|less|fewer|worse|better|higher|lower|larger"
          r"|smaller|different|match|later|sooner)\w+", "is not a", "100 is no legal size", "there is no such file"),
    Habit(r"\bso many\b", "n, this many, as many as", "so many GPUs", "this many GPUs"),
    Habit(r"\banew\b", "again, re-", "computed anew", "computed again"),
    Habit(r"\bby heart\b", "overfit", "learns the text by heart", "overfits"),
    Habit(r"\b(?:is|are|was|were) to be\b", "will be, must be", "is to be packed", "has to be packed"),
    Habit(r"\b[Tt]old\b", "reported, given, distinguished", "what is told of it", "what is reported"),
    Habit(r"\b(?:is|are|was|were) said\b", "is reported, is stated", "and that is said", "and that is reported"),
    Habit(r"\bsays? so\b", "reports, declares", "the report says so", "the report lists them"),
    Habit(r"\bof (?:its|their|one's|our|your|my) own\b", "separate, own", "a scale of its own", "its own scale"),
    Habit(r"\b[Bb]eside\b", "next to, in addition to, compared with", "beside the text", "in addition to the text"),
    Habit(r"\bno legal\b", "not a valid", "no legal size", "not a valid size"),
    Habit(r"\bone's\b", "name the thing", "in one's file", "in the user's file"),
    Habit(r"\bwhat (?:is|was|are) asked\b", "name what is requested", "what is asked for", "the requested bits"),
    Habit(r"\bthe same of\b", "repeat the noun", "the same of the zeros", "the zeros likewise"),
    Habit(r"\bthat one's\b", "repeat the noun", "that one's scale", "the scale of that group"),
    Habit(r"\b(?:stands?|stood|standing) still\b", "suspended, waits", "the forward stands still", "the forward waits"),
    Habit(r"\b(?:left|leaves?|stays?|stay|kept|keeps?|remain(?:s|ed)?) as (?:it is|they are|it was|they were)\b",
          "kept in float, unchanged", "the layer stays as it is", "the layer is kept in float"),
    Habit(r"\b[Ss]tarved\b", "under-sampled", "starved experts", "under-sampled experts"),
    Habit(r"\b[Ww]atch(?:es|ed|ing)?\b", "record, observe, hook", "the model is watched", "the inputs are recorded"),
    Habit(r"\b[Yy]ardsticks?\b", "baseline", "the plain yardstick", "the plain baseline"),
    Habit(r"\bheld beside\b|\bhold(?:s|ing)? .{1,40} beside\b", "compare with", "held beside it", "compared with it"),
    Habit(r"\btimes so\b|\bso much as\b", "as much as", "four times so large", "four times as large"),
    Habit(r"\bthe very (?!end|first|last)\w+", "leave out, or: the same", "the very rounding", "the same rounding"),
    Habit(r"\bwhich (?:is|was) nothing\b", "no measurable change", ".51 to .50, which is nothing", "no change"),
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A piece of prose and where it begins."""

    file: Path
    line: int
    text: str

    def place(self, offset: int) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line + self.text.count(chr(10), 0, offset)}"


def habits_in(text: Text) -> list[str]:
    return [
        f'{text.place(match.start())}: "{" ".join(match.group().split())}", write: {habit.instead}'
        for habit in HABITS
        for match in habit.matches(text.text)
    ]


def blanked(match: re.Match[str]) -> str:
    """The line breaks of a piece that is left out, so that line numbers stay true."""
    return "\n" * match.group().count("\n")


def prose(file: Path) -> Text:
    """A page without code, pictures, generated parts and comments, its links reduced to their words."""
    return Text(file, 1, re.sub(r"`[^`\n]*`", "CODE", written(file)))


def written(file: Path) -> str:
    """The same with the code inside of sentences."""
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", blanked, text, flags=re.S)
    text = re.sub(r"<!-- (?:begin: )?([\w .]+?)(?: begins)? -->.*?<!-- (?:end: )?\1(?: ends)? -->", blanked, text,
                  flags=re.S)  # fmt: skip
    text = re.sub(r"<!--.*?-->", blanked, text, flags=re.S)
    text = re.sub(r"^( *)```.*?^\1```$", blanked, text, flags=re.S | re.M)
    text = re.sub(r"^ {4}(?! *[*-] ).*$", "", text, flags=re.M)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def sentences(text: str) -> Iterator[str]:
    """Sentences of a page; a paragraph, a heading and an item of a list each end one, tables are left out."""
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )|\n(?=#)", text):
        yield from (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\)?\**\s", paragraph) if part.strip())


def written_in(file: Path) -> Iterator[Text]:
    """Docstrings, messages and comments of a Python file, without identifiers in backquotes."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        words = ""
        if isinstance(node, ast.JoinedStr):
            words = "".join(str(p.value) if isinstance(p, ast.Constant) else "VALUE" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            words = node.value
        if len(words.split()) >= MESSAGE_WORDS:
            assert isinstance(node, ast.expr)
            yield Text(file, node.lineno, re.sub(r"`[^`\n]*`", "CODE", words))
    yield from comments(file, source)


def comments(file: Path, source: str) -> Iterator[Text]:
    """Comments, those on neighbouring lines as one text."""
    start, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != start + len(lines):
            yield Text(file, start, "\n".join(lines))
            start, lines = token.start[0], []
        lines.append(re.sub(r"`[^`]*`", "CODE", token.string.lstrip("#")))
    yield Text(file, start, "\n".join(lines))


def helped(command: str) -> str:
    """What `llmq COMMAND --help` prints, on one wide screen."""
    arguments = [command, "--help"] if command else ["--help"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "2000", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.output


def as_parameters(pages: list[Path]) -> list[object]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.example)
def test_a_habit_is_caught_and_its_plain_form_is_not(habit: Habit) -> None:
    assert list(habit.matches(habit.example))
    assert not [other.pattern for other in HABITS for _ in other.matches(habit.plain)]


@pytest.mark.parametrize("page", as_parameters(PAGES))
def test_pages_avoid_the_habits(page: Path) -> None:
    assert not habits_in(prose(page)), "\n" + "\n".join(habits_in(prose(page)))


@pytest.mark.parametrize("page", as_parameters(MAIN_PAGES))
def test_sentences_are_short(page: Path) -> None:
    long = [sentence for sentence in sentences(prose(page).text) if len(sentence.split()) > LONGEST_SENTENCE]
    assert not long, "\n" + "\n".join(f"{len(sentence.split())} words: {sentence}" for sentence in long)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_avoids_the_habits(command: str) -> None:
    text = helped(command)
    caught = [f'llmq {command} --help: "{match.group()}", write: {habit.instead}'
              for habit in HABITS for match in habit.matches(text)]  # fmt: skip
    assert not caught, "\n" + "\n".join(caught)


def test_every_command_has_its_help_read() -> None:
    assert set(every_command()) == set(COMMANDS) - {""}


@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_code_avoids_the_habits(folder: str) -> None:
    files = [file for file in sorted((ROOT / folder).rglob("*.py")) if file != Path(__file__)]
    assert files
    caught = [line for file in files for text in written_in(file) for line in habits_in(text)]
    assert not caught, f"\n{len(caught)} in {folder}/:\n" + "\n".join(caught)


def unclear_names(source: str) -> list[int]:
    """The lines that bind a variable or a parameter of NAMES; fields of classes are excepted."""
    tree = ast.parse(source)
    fields = {id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.value is None}
    variables = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in NAMES
                 and isinstance(node.ctx, ast.Store) and id(node) not in fields}  # fmt: skip
    parameters = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.arg) and node.arg in NAMES}
    return sorted(variables | parameters)


def test_unclear_names_are_caught() -> None:
    assert unclear_names("found = [each for each in x]\ndef f(found): pass\nclass A:\n    found: int\n") == [1, 2]


@pytest.mark.parametrize("folder", CODE_FOLDERS)
def test_variables_say_what_they_hold(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    caught = [f"{file.relative_to(ROOT)}:{line}" for file in files for line in unclear_names(file.read_text("utf-8"))]
    assert not caught, "\n" + "\n".join(caught)


def anchors(page: Path) -> set[str]:
    """What links to headings of a page are called."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def is_there(name: str) -> bool:
    """Whether a page names an existing file or folder, from the root or from a folder that the page is about."""
    return any((ROOT / folder / name).exists() for folder in ("", "llmq", "kernels", "kernels/llmq_kernels", "eval"))


# CONTRIBUTING names files that its reader writes; tests/meta/test_contributing.py writes and runs them.
@pytest.mark.parametrize("page", as_parameters([page for page in PAGES if page.name != "CONTRIBUTING.md"]))
def test_named_files_exist(page: Path) -> None:
    names = re.findall(r"`([a-z_][\w./-]*/[\w-]+\.(?:py|md|sh|json)|\w+(?:/\w+)+/)`", written(page))
    assert [name for name in names if not is_there(name)] == []


def test_the_readme_is_short_and_begins_with_its_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    first_screen = "\n".join(lines[:FIRST_SCREEN])
    assert "bash scripts/demo.sh" in first_screen
    assert "bash scripts/test.sh" in first_screen
