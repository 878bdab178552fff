"""Write a model folder, or the blocks of a run, as a .gguf file with configuration and tokenizer next to it.

llama.cpp needs only the file. Other engines and people may need the original config.json, the tokenizer files, the
licence and the model card.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from llmq import formats
from llmq.checkpoint.json_text import json_text
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import Part
from llmq.checkpoint.side_files import companions
from llmq.checkpoint.writer import CONFIG, put_companions
from llmq.config import QuantConfig
from llmq.gguf import export, from_run
from llmq.gguf.export import Summary
from llmq.gguf.imatrix import Importance
from llmq.gguf.writer import Written


def gguf_name(out: Path, recipe: str = "") -> str:
    """`llama-4bit.gguf` for an output folder of that name.

    The folder `gguf-q4_k_m` in it, if that is the `recipe`, has `llama-4bit-q4_k_m.gguf`.
    """
    folder = out.resolve()
    if folder.name != recipe.replace(":", "-"):
        return f"{folder.name}.gguf"
    return f"{folder.parent.name}-{recipe.partition(':')[2]}.gguf"


def export_gguf(source: Path, folder: Path, out: Path) -> Summary:
    """Write the packed model in `source` as a .gguf file in `folder`, named after `out`, and compare every weight.

    Raises FormatError if a weight would have to be rounded, UnsupportedModelError if llama.cpp cannot run the model.
    """
    summary = export.export(source, folder / gguf_name(out))
    _add_companions(Checkpoint.open(source), folder)
    return summary


def blocks_to_gguf(
    parts: Sequence[Part], source: Checkpoint, outside: Sequence[str], settings: QuantConfig, device: torch.device,
    folder: Path, out: Path, importance: Importance | None,
) -> Written:  # fmt: skip
    """Write the blocks of a run on a GGUF grid as a .gguf file; the arguments are those of `from_run.assemble`."""
    file = folder / gguf_name(out, settings.formats[0])
    written = from_run.assemble(file, source, parts, outside, settings, device, importance)
    _add_companions(source, folder)
    return written


def _add_companions(checkpoint: Checkpoint, folder: Path) -> None:
    config = formats.with_settings(checkpoint.config, None, {})
    put_companions(folder, companions(checkpoint.folder).files, {CONFIG: json_text(config)})
