"""The code blocks of CONTRIBUTING.md, inserted in the files that it names, work together."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import command_line

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ROW = "# llmq/methods.py, a row of METHODS"
SMALL = ["--group-size", "16", "--samples", "4", "--seqlen", "48", "--device", "cpu"]

# Runs each command of a JSON list as `llmq` would, in one process, and prints the output of each.
DRIVER = """
import contextlib, io, json, sys
from llmq import cli
outputs = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, stdout = ["llmq", *arguments], io.StringIO()
    with contextlib.redirect_stdout(stdout):
        try:
            cli.main()
        except SystemExit as leaving:
            if leaving.code:
                raise
    outputs.append(stdout.getvalue())
print(json.dumps(outputs))
"""
LOAD = "import sys, llmq; model, _ = llmq.load(sys.argv[1]); print(type(model.model.layers[0].mlp.down_proj).__name__)"


def blocks(language: str) -> list[str]:
    """The code blocks of the page in one language."""
    return [code for name, code in BLOCK.findall(PAGE) if name == language]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of llmq and all code blocks of the page."""
    folder = tmp_path_factory.mktemp("contributing")
    shutil.copytree(ROOT / "llmq", folder / "llmq", ignore=shutil.ignore_patterns("__pycache__"))
    for code in blocks("python"):
        header, _, body = code.partition("\n")
        if header == ROW:
            _insert_row(folder / "llmq" / "methods.py", body)
            continue
        file = folder / header.removeprefix("# ")
        assert file.parent.is_dir(), f"the page names {header}, but there is no such folder"
        assert not file.exists(), f"the page names {header}, which already exists"
        file.write_text(body, encoding="utf-8")
    return folder


def _insert_row(file: Path, row: str) -> None:
    source = file.read_text(encoding="utf-8")
    (start,) = re.findall(r"^METHODS\b.*\{\n", source, re.MULTILINE)
    file.write_text(source.replace(start, start + row), encoding="utf-8")


def run(package: Path, program: str, *arguments: str) -> str:
    """The standard output of a Python program that imports the copy."""
    environment = command_line.environment(PYTHONPATH=f"{package}:{ROOT / 'kernels'}")
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(folder: Path, model: Path, table: Path) -> list[list[str]]:
    """The commands of the page, on a small model and a small text."""
    (shell,) = blocks("sh")
    names = {"MODEL": str(model), "OUT": str(folder / "out"), "OUT-ct": str(folder / "ct")}
    lines = []
    for line in shell.splitlines():
        program, *arguments = (names.get(word, word) for word in shlex.split(line))
        assert program == "llmq"
        lines.append([word.replace("TEXT.csv", str(table)) for word in arguments])
        lines[-1] += SMALL if arguments[0] == "quantize" else ["--seqlen", "48"] if arguments[0] == "eval" else []
    return lines


def test_every_kind_of_extension_has_a_code_block() -> None:
    headers = [code.partition("\n")[0].removeprefix("# ") for code in blocks("python")]
    folders = [header.rpartition("/")[0] for header in headers]
    assert folders.count("llmq/algorithms") == 3
    assert {"llmq/formats", "llmq/calibration/readers", "llmq/cli"} <= set(folders)
    assert ROW.removeprefix("# ") in headers


def test_documented_extensions_work(package: Path, checkpoint: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    table = tmp_path / "text.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("number", "story"), ("1", text.read_text(encoding="utf-8")), ("2", "More text.")])
    model = checkpoint("llama")
    lines = commands(tmp_path, model, table)
    outputs = json.loads(run(package, DRIVER, json.dumps(lines)))
    printed = {" ".join(line[:1] + line[-1:]): output for line, output in zip(lines, outputs, strict=True)}

    record = json.loads((tmp_path / "out" / "llmq.json").read_text(encoding="utf-8"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert settings["quant_method"] == "plain-bytes"
    assert record["settings"]["method"] == "nearest"
    assert {"pairs", "rescale"} <= {stage["stage"] for stage in record["stages"]}
    assert record["calibration"]["manifest"][0]["documents"] == 2
    assert json.loads((tmp_path / "ct" / "llmq.json").read_text(encoding="utf-8"))["conversions"][0]["compared"] == 21
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < int(printed[f"size {tmp_path / 'out'}"]) <= size
    assert "Print how many bytes the weights of a model take." in printed["size --help"]
    assert run(package, LOAD, str(tmp_path / "out")).strip() == "PackedLinear"


def test_help_lists_the_added_names(package: Path) -> None:
    outputs = json.loads(run(package, DRIVER, json.dumps([["--help"], ["quantize", "--help"]])))
    assert re.search(r"Inspect.*\bsize\b", outputs[0], re.DOTALL)
    assert "plain-bytes" in re.sub(r"[\s│]+", " ", outputs[1]).replace("- ", "-")
    assert "nearest" in outputs[1]
