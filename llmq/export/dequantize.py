"""`llmq.dequantize`: the float weights of a quantized model, in any format."""

import logging
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.runtime.open_skeleton import compared

logger = logging.getLogger(__name__)


def dequantize(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, weight)` for every quantized weight: (N, K) float32, with its name in the original model.

    `path` is a folder, a Hub id, or a .gguf file or its folder; the latter have GGUF names. Raises CheckpointError and
    FormatError.
    """
    file = gguf_file(Path(path))
    if file is not None:
        from llmq.gguf import reader

        yield from reader.dequantize(file)
        return
    checkpoint = Checkpoint.open(hub.locate(str(path), None))
    packed = PackedWeights(checkpoint)
    for note in compared(checkpoint, complete=False).notes:
        logger.warning("%s", note)
    for module in packed.modules:
        yield packed.weight_name(module), packed.weight(module)
