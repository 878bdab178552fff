"""Write the generated pages and the generated parts of pages.

python scripts/docs.py                      all pages and parts that do not need a long run
python scripts/docs.py --check              write nothing; exit with 1 if one of these is stale
python scripts/docs.py kernels FILE…        print the tables of result files of scripts/gpu_suite.py
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "ARCHITECTURE.md"
FORMATS = ROOT / "docs" / "FORMATS.md"
SERVING, KERNELS = ROOT / "docs" / "SERVING.md", ROOT / "kernels" / "README.md"
RELIABILITY, HOSTILE = ROOT / "docs" / "RELIABILITY.md", ROOT / "docs" / "HOSTILE_INPUT.md"
PEERS = ROOT / "eval" / "peers" / "results"
# This checkout, for the builders of the tests; the programs of eval/ import each other by their names.
sys.path[:0] = [str(ROOT / part) for part in (".", "kernels", "eval", "eval/peers", "scripts")]

import fault_counts  # noqa: E402  (needs the path)
import reference  # noqa: E402

# ---- parts of pages


def replaced(text: str, name: str, part: str) -> str:
    """Return a page with `part` between the lines `<!-- begin: name -->` and `<!-- end: name -->`."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, begun, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not begun or not closed:
        raise ValueError(f"a page has no lines {begin} and {end}, expected both around the generated part")
    return f"{before}{begin}\n{part}\n{end}{after}"


def results() -> str:
    """The table of KL divergences in the README, from the figures in eval/peers/results."""
    import table

    return table.summary({name: read_json(PEERS / f"{name}.json") for name in table.MODELS})


def serving() -> str:
    """The rules that `llmq verify --for` checks, as a table, and which layers engines fuse and split."""
    from llmq.verification.engines import PARALLEL, TILES
    from llmq.verification.engines.rules import ENGINES, REFUSES, RULES, SERVERS, SGLANG
    from llmq.verification.engines.tensor_parallel import FUSED, ROW_PARALLEL

    def row(name: str, engines: Sequence[str], asks: str, outcome: str, source: str, *, ran: bool = False) -> str:
        shown = ", ".join(engine for engine in ENGINES if engine in engines)
        cells = (name, shown, asks, outcome, "run" if ran else "read from source", source)
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    lines = ["| rule | engines | requirement | otherwise | seen | source |", "|---|---|---|---|---|---|"]
    lines += [row(rule.name, rule.engines, rule.asks, rule.outcome, rule.source, ran=rule.ran) for rule in RULES]
    for engines, (name, asks, _, source) in ((SERVERS, PARALLEL), ((SGLANG,), TILES)):
        lines.append(row(name, engines, asks, f"{REFUSES}, for that number of GPUs", source))
    fused = "; ".join(
        f"`{name}` = {' + '.join(f'`{member}`' for member in members)}" for name, members in FUSED.items()
    )
    rows = ", ".join(f"`{name}`" for name in sorted(ROW_PARALLEL))
    lines += [
        "",
        f"Run as one layer: {fused}; and all experts of a layer. Split between inputs on",
        f"several GPUs: {rows}. All other layers are split between outputs.",
    ]
    return "\n".join(lines)


def architectures() -> str:
    """The architectures of llama.cpp, and the models of transformers that llmq writes for them."""
    from llmq.gguf.architectures import ARCHITECTURES

    kinds: dict[str, list[str]] = {}
    for kind, arch in sorted(ARCHITECTURES.items()):
        kinds.setdefault(arch.name, []).append(f"`{kind}`")
    rows = [f"| {name} | {', '.join(models)} |" for name, models in sorted(kinds.items())]
    return "\n".join(["| llama.cpp | `model_type` in config.json |", "|---|---|", *rows])


def kernels(folder: Path | None = None) -> str:
    """The tables of GPUs, then CPUs, each with hardware and date; from kernels/bench/results."""
    from bench import results, tables

    folder, missing = folder or results.FOLDER, "not measured yet"
    gpus = [tables.report(results.read(path)) for path in results.gpu_files(folder)]
    cpus = [tables.cpu(read_json(path)) for path in results.cpu_files(folder)]
    return "\n\n".join([*(gpus or [f"### GPU\n\n{missing}"]), *(cpus or [f"### CPU\n\n{missing}"])])


def tree(package: Path = ROOT / "llmq") -> str:
    """Every folder and module of a package, with the first sentence of its docstring."""
    entries = list(tree_entries(package, 0))
    width = max(len(name) for name, _ in entries) + 2
    return "\n".join(["```text", *(f"{name:{width}}{sentence}".rstrip() for name, sentence in entries), "```"])


def tree_entries(folder: Path, depth: int) -> Iterator[tuple[str, str]]:
    """(indented name, sentence): a folder, its modules, then the folders in it."""
    yield f"{'  ' * depth}{folder.name}/", first_sentence(folder / "__init__.py")
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield f"{'  ' * (depth + 1)}{file.name}", first_sentence(file)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))):
        yield from tree_entries(inner, depth + 1)


def first_sentence(file: Path) -> str:
    """The first sentence of a module docstring on one line, without its period; empty without a docstring."""
    text = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "") if file.is_file() else ""
    return re.split(r"(?<=[.!?])\s", " ".join(text.split("\n\n")[0].split()))[0].removesuffix(".")


PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "architectures": (FORMATS, architectures),
    "results": (README, results),
    "rules": (SERVING, serving),
    "kernels": (KERNELS, kernels),
    "tree": (ARCHITECTURE, tree),
    "kills": (RELIABILITY, fault_counts.kills),
    "fuzz": (HOSTILE, fault_counts.fuzz),
}

# ---- whole pages


def experiments() -> Iterator[tuple[Path, str]]:
    """The pages of eval/, each rendered by its program from the figures next to it."""
    import ablation
    import architecture_page
    import formats
    import sweep
    import table

    yield ablation.MARKDOWN, ablation.render(ablation.read(ablation.JSON), ablation.read(ablation.DOMAINS_JSON))
    yield architecture_page.MARKDOWN, architecture_page.page(architecture_page.read(architecture_page.JSON))
    yield formats.MARKDOWN, formats.render(formats.read(formats.JSON))
    yield sweep.MARKDOWN, sweep.render(sweep.read(sweep.JSON))
    for name in table.MODELS:
        yield PEERS / f"{name}.md", table.render(read_json(PEERS / f"{name}.json"))


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that does not need a long run, with its current text."""
    for name, (page, part) in PARTS.items():
        yield page, replaced(page.read_text(encoding="utf-8"), name, part())
    yield ROOT / "docs" / "report.schema.json", report_schema()
    yield from experiments()
    yield from reference.pages()


def report_schema() -> str:
    """The JSON schema of report.json."""
    from llmq.checkpoint.json_text import json_text
    from llmq.report.pages import schema

    return json_text(schema())


def read_json(file: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return content


# ---- the command


def stale(current: Iterator[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """The pages whose text has changed."""
    return [(page, text) for page, text in current if not page.is_file() or page.read_text(encoding="utf-8") != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("kernels").add_argument("files", type=Path, nargs="+", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.command == "kernels":
        from bench import results, tables

        print("\n\n".join(tables.report(results.read(file)) for file in arguments.files))
        return 0
    outdated = stale(pages())
    for page, text in outdated:
        print(f"{page.relative_to(ROOT)} {'is stale: run python scripts/docs.py' if arguments.check else 'written'}")
        if not arguments.check:
            page.write_text(text, encoding="utf-8")
    return int(arguments.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
