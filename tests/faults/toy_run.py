"""A toy run in a separate process, for faults that would harm this one: three blocks, a tuned version, two shards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]

# The code with which every process below starts: a toy run whose blocks have 4 kB each.
PREAMBLE = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from llmq.checkpoint.safetensors_files import read_header, read_tensor
from llmq.checkpoint.writer import Writer
from llmq.errors import LlmqError

folder = Path(sys.argv[1])

def open_writer(out, overwrite=False):
    return Writer.open(out, identity={"run": 1}, overwrite=overwrite, needed_bytes=0)

def tune(writer):
    revision = writer.revision
    if revision.adopted is not None:
        return
    revision.begin()
    for step in (1, 2):
        if (revision.progress or {"step": 0})["step"] >= step:
            continue
        revision.write_state("a", step, {"x": torch.full((4,), float(step))})
        revision.write_block(0, step, {"layers.0.weight": torch.full((1024,), float(step))})
        revision.save({"step": step, "best": step}, ["a"], [0])
    revision.adopt({"best": 2}, [0])

def block(index, values=1024):
    return {f"layers.{index}.weight": torch.arange(values, dtype=torch.float32) * index}

def run(out, overwrite=False):
    writer = open_writer(out, overwrite)
    for index in range(3):
        if not writer.has(index):
            writer.commit(index, block(index), {"index": index})
            writer.settle()
    tune(writer)
    source = folder / "source" / "model.safetensors"
    rest = [(source, name, info) for name, info in read_header(source).items()]
    documents = {"config.json": json.dumps({"new": True}), "card.md": "# new"}
    with writer.finishing() as final:
        files = {"tokenizer.json": folder / "source" / "tokenizer.json"}
        writer.assemble(final, rest, files, documents, shard_bytes=9000)
"""


def source_model(folder: Path) -> Path:
    """Write the source model of the toy run into a folder, and return the folder."""
    (folder / "source").mkdir()
    save_file({"embed": torch.arange(100.0), "head": torch.arange(50.0)}, folder / "source" / "model.safetensors")
    (folder / "source" / "tokenizer.json").write_text("{}")
    return folder


def in_a_process(folder: Path, program: str, seconds: float = 120) -> Any:
    """Run PREAMBLE and `program` on a folder, for at most `seconds`; returns the JSON that it prints."""
    command = [sys.executable, "-c", PREAMBLE + program, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# For programs that run the toy run once per place of a fault.
FORKS = """
import shutil

def fork(act):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except LlmqError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]

def contents(out):
    if not out.exists():
        return {}
    return {entry.name: entry.read_bytes() for entry in out.iterdir() if entry.is_file() and entry.name != ".llmq-lock"}
"""
