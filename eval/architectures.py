"""Quantize, save, load and run a toy model of every class of transformers that writes text, also those with images.

    python eval/architectures.py            the rows that eval/results/architectures.json lacks; then docs/MODELS.md
    python eval/architectures.py NAME…      these model types again
    python eval/architectures.py --render   docs/MODELS.md from the file

Each class runs in a separate process, with a limit of CPU time and memory, one after the other: about 20 minutes of
CPU time in all. `tests/toy_configs.py` makes the configurations, `tests/architectures.py` compares.
"""

import argparse
import datetime
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]

import torch  # noqa: E402
import transformers  # noqa: E402
from architecture_page import JSON, MARKDOWN, Row, page, read, write  # noqa: E402

from llmq.errors import LlmqError, UnsupportedModelError  # noqa: E402
from tests import builders  # noqa: E402
from tests.architectures import counted, examine  # noqa: E402
from tests.runs import logits, relative  # noqa: E402
from tests.toy_configs import Entry, entries, toy_config  # noqa: E402

SECONDS, BYTES = 40, 6 << 30  # limits of one class


def outcome(line: Entry) -> Row:
    """The figures of one class, or at which step it stops, and with which message."""
    step, whole = "configuration", ""
    try:
        config = toy_config(line)
        if config.is_encoder_decoder:
            return {"step": "encoder-decoder"}
        step = "build"
        model = builders.causal_model(config)
        if type(model).__name__ != line.model_class:
            return {"step": step, "message": f"transformers builds a {type(model).__name__}"}
        step = "text"
        logits(model, builders.tokens(2, 16))
        step = "llmq"
        with tempfile.TemporaryDirectory() as folder:
            (scratch := Path(folder) / "scratch").mkdir()
            text = builders.write_text(Path(folder) / "text.txt")
            try:
                measured = examine(config, scratch, text)
            except UnsupportedModelError as error:
                if "rtn" not in error.hint:
                    raise
                shutil.rmtree(scratch)
                scratch.mkdir()
                measured, whole = examine(config, scratch, text, method="rtn"), str(error)
    except Exception as error:  # whatever a class of transformers raises
        kind = "refused" if step == "llmq" and isinstance(error, LlmqError) else step
        if kind == "llmq" and not reads_its_own_files(model):
            return {"step": "files", "message": "what it reads is not what it saved"}
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        message = re.sub(r"\S+scratch/model", "the folder", str(error))
        return {"step": kind, "error": type(error).__name__, "message": message, "place": place}
    return {
        "step": "measured",
        "whole": whole,
        "blocks": measured.blocks,
        "layers": len(measured.packed),
        "left": [[name, reason, number] for (name, reason), number in sorted(counted(measured.left).items())],
        "difference": measured.difference,
        "noticed": measured.noticed,
        "replayed": measured.replayed,
        "streamed": measured.streamed,
        "finite": measured.finite,
        "packed routers": measured.routers,
        "unlisted": list(measured.unlisted),
        "altered": list(measured.altered),
    }


def reads_its_own_files(model: Any) -> bool:
    """Whether transformers gives the same logits for a model that it saved and read again."""
    ids = builders.tokens(2, 16)
    with tempfile.TemporaryDirectory() as folder:
        builders.save_model(Path(folder) / "model", model)
        again = type(model).from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    return relative(logits(again, ids), logits(model, ids)) < 1e-3


def apart(run: Callable[[], Row]) -> Row:
    """Run a function in a separate process, with limits; a process that dies is a row that reports it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        with os.fdopen(writer, "w", encoding="utf-8") as stream:
            json.dump(run(), stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        text = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(text) if text else {"step": "killed", "message": f"ended with {status} at a limit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    if not arguments.render:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        sweep(arguments.names)
    MARKDOWN.write_text(page(read(JSON)), encoding="utf-8")


def sweep(names: list[str]) -> None:
    """Add the rows that the file lacks, or those of `names` again."""
    stamp: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": [f"{name} {version(name)}" for name in ("transformers", "torch")],
    }
    outcome(Entry("causal", "llama", "LlamaForCausalLM"))  # imports what every class needs, once
    rows = [row for row in read(JSON) if row["step"] != "not run" and not row.get("earlier")]
    done = {(row["mapping"], row["type"]) for row in rows}
    for line in entries():
        key = (line.mapping, line.model_type)
        if (line.model_type in names) if names else key not in done:
            about = {"mapping": line.mapping, "type": line.model_type, "class": line.model_class}
            row = {**about, **apart(lambda line=line: outcome(line)), **stamp}  # type: ignore[misc]
            write(row)
            print(json.dumps(row)[:300], flush=True)


if __name__ == "__main__":
    main()
