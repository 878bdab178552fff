"""`llmq.dequantize`: the float weights that a quantized model stands for, whatever it is stored as."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.checkpoint_weights import PackedWeights


def dequantize(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """`(name, weight)` for every quantized weight: (N, K) float32, under the name that it had before.

    `path` is a folder, a Hub id, or a .gguf file or its folder, where names are GGUF's.  Raises CheckpointError and
    FormatError.
    """
    file = gguf_file(Path(path))
    if file is not None:
        from llmq.gguf import reader

        yield from reader.dequantize(file)
        return
    packed = PackedWeights(Checkpoint.open(hub.locate(str(path), None)))
    for module in packed.modules:
        yield packed.weight_name(module), packed.weight(module)
