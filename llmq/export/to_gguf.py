"""Write a model folder, or the blocks of a run, as a .gguf file with configuration and tokenizer next to it.

llama.cpp needs only the file. Other engines and people may need the original config.json, the tokenizer files, the
licence and the model card.
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
    """Write the packed model in `source` as a .gguf file in `folder`, named after `out`, and compare every weight.

    Raises FormatError if a weight would have to be rounded, UnsupportedModelError if llama.cpp cannot run the model.
    """
    summary = export.export(source, folder / gguf_name(out))
    _add_companions(Checkpoint.open(source), folder)
    return summary


def blocks_to_gguf(parts: Sequence[Part], plan: Plan, folder: Path, out: Path) -> Written:
    """Write the blocks of a run on a GGUF grid as a .gguf file."""
    file = folder / gguf_name(out)
    written = from_run.assemble(file, plan.checkpoint, parts, plan.outside(), plan.settings, plan.device)
    _add_companions(plan.checkpoint, folder)
    return written


def _add_companions(checkpoint: Checkpoint, folder: Path) -> None:
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    put_companions(folder, companion_files(checkpoint.folder), {CONFIG: json_text(config)})
