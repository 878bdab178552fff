"""A model's folder, or the blocks of a run -> a .gguf file with configuration and tokenizer beside it.

The file is what llama.cpp takes, alone.  What lies beside it is for engines and people who want to know the rest: the
original config.json, the tokenizer's own files, licence and card.
"""

from collections.abc import Sequence
from pathlib import Path

from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import Part
from llmq.checkpoint.side_files import companion_files
from llmq.checkpoint.writer import CONFIG, put_companions
from llmq.gguf import export, from_run
from llmq.gguf.export import Summary
from llmq.gguf.writer import Written
from llmq.plan import Plan


def gguf_name(out: Path) -> str:
    """`llama-balanced-4bit.gguf` for an output folder of that name."""
    return f"{out.resolve().name}.gguf"


def export_gguf(source: Path, folder: Path, out: Path) -> Summary:
    """The packed model in `source` as a .gguf file in `folder`, named after `out`; every weight proved to be the same.

    Raises FormatError where something would have to be rounded, UnsupportedModelError where llama.cpp cannot run it.
    """
    summary = export.export(source, folder / gguf_name(out))
    _put_beside(Checkpoint.open(source), folder)
    return summary


def blocks_to_gguf(parts: Sequence[Part], plan: Plan, folder: Path, out: Path) -> Written:
    """The same from blocks that a run staged on a grid of GGUF's own."""
    file = folder / gguf_name(out)
    written = from_run.assemble(file, plan.checkpoint, parts, plan.outside(), plan.settings, plan.device)
    _put_beside(plan.checkpoint, folder)
    return written


def _put_beside(checkpoint: Checkpoint, folder: Path) -> None:
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    put_companions(folder, companion_files(checkpoint.folder), {CONFIG: json_text(config)})
