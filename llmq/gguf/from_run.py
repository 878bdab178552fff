"""Assemble the .gguf file of a run with a native GGUF grid: staged blocks unchanged, embedding and head quantized here.

There are no statistics of the inputs of embedding and head.  So their grids are searched for the least squared error,
weighted if an importance matrix has values for them, and their weights are rounded to nearest, unless they already lie
on the grid of their block type.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import Part, TensorInfo, read_tensor
from llmq.config import QuantConfig
from llmq.formats import gguf as staged
from llmq.formats.codecs import gguf_blocks
from llmq.gguf import recipes
from llmq.gguf.imatrix import Importance
from llmq.gguf.stored import Stored
from llmq.gguf.writer import Written, write
from llmq.numerics import affine_grid
from llmq.numerics.keep_grid import keep
from llmq.numerics.quantized_tensor import with_zeros
from llmq.numerics.scheme import WeightScheme

ROWS_AT_ONCE = 1 << 22  # weights of an embedding that are quantized together


def assemble(
    file: Path, source: Checkpoint, parts: Sequence[Part], outside: Sequence[str], settings: QuantConfig,
    device: torch.device, importance: Importance | None = None,
) -> Written:  # fmt: skip
    """Write `file` from the staged `parts` and the tensors `outside` of the blocks, read from `source`.

    Raises the same errors as `writer.write`.
    """
    grids = recipes.outside({name: source.info(name).shape for name in outside}, settings, source.config)
    tensors = [_staged(*part) for part in parts]
    kept: set[str] = set()

    def pack(name: str, scheme: WeightScheme) -> NDArray[np.uint8]:
        weight = source.tensor(name)
        exact = on_existing_grid(weight, scheme, device) if settings.keep_grid else None
        if exact is None:
            return rounded(weight, scheme, device, None if importance is None else importance.of(module(name)))
        kept.add(name)
        return exact

    for name in outside:
        shape, scheme = source.info(name).shape, grids.get(name)
        if scheme is None:
            tensors.append(Stored(name, None, shape, _floats(partial(source.tensor, name))))
        else:
            tensors.append(Stored(name, str(scheme).upper(), shape, partial(pack, name, scheme)))
    (name,) = settings.formats
    written = write(file, source.folder, tensors, name.removeprefix(recipes.PREFIX))
    notes = [f"{name}: lossless, already on the grid of {grids[name]}" for name in grids if name in kept]
    for name in grids:
        if name not in kept:
            weighed = importance is not None and importance.of(module(name)) is not None
            notes.append(f"{name} is rounded to nearest in {grids[name]}" + (", weighted" if weighed else ""))
    return dataclasses.replace(written, notes=(*written.notes, *notes))


def _staged(path: Path, name: str, info: TensorInfo) -> Stored:
    module, _, suffix = name.rpartition(".")
    if suffix not in staged.SUFFIXES:
        return Stored(name, None, info.shape, _floats(lambda: read_tensor(path, info)))
    kind = suffix.removeprefix(staged.PREFIX).upper()
    shape = (info.shape[0], gguf_blocks.row_weights(kind, info.shape[1]))
    return Stored(f"{module}.weight", kind, shape, lambda: read_tensor(path, info).numpy())


def on_existing_grid(weight: torch.Tensor, scheme: WeightScheme, device: torch.device) -> NDArray[np.uint8] | None:
    """`weight` (N, K) without any error as uint8 (N, bytes of a row), or None if it is not on the grid of `scheme`."""
    pieces = []
    for rows in weight.split(max(1, ROWS_AT_ONCE // weight.shape[1])):
        kept = keep(rows.to(device, torch.float32), weight.dtype, scheme, torch.float16)
        if kept is None or not kept.exact:
            return None
        pieces.append(staged.pack_blocks(kept.quantized))
    return np.concatenate(pieces)


def module(name: str) -> str:
    return name.removesuffix(".weight")


def rounded(
    weight: torch.Tensor, scheme: WeightScheme, device: torch.device, importance: torch.Tensor | None = None
) -> NDArray[np.uint8]:
    """`weight` (N, K) rounded to nearest on the grid of least squared error -> uint8 (N, bytes of a row).

    importance  (K,) float32, the weights of the squared errors; 1 where not given
    """
    pieces = []
    costs = None if importance is None else importance.to(device)
    for rows in weight.split(max(1, ROWS_AT_ONCE // weight.shape[1])):
        part = rows.to(device, torch.float32)
        chosen = affine_grid.fit_searched(part, scheme, torch.float16, costs)
        pieces.append(staged.pack_blocks(with_zeros(chosen.quantized(chosen.encode(part)), part)))
    return np.concatenate(pieces)


def _floats(read: Callable[[], torch.Tensor]) -> Callable[[], NDArray[np.float32]]:
    return lambda: read().to(torch.float32).numpy()
