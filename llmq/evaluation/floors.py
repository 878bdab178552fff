"""Floors: the original compared with itself, computed in another way.

Floats are rounded, so the same weights give other logits in another batch size, in another dtype and in another engine.
A model whose distance from the original is near such a floor cannot be distinguished from the original.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmq import memory
from llmq.checkpoint.reader import Checkpoint
from llmq.evaluation.scoring import windows_per_batch
from llmq.evaluation.streaming import Source, Streamed, Whole
from llmq.gguf.reader import is_file
from llmq.runtime.load import stored_dtype

WHOLE_PART = 0.8  # of the free memory, for the weights of a whole model; the rest is for activations


class Opener(Protocol):
    """Opens the original; by default as it is opened to be compared with."""

    @property
    def base(self) -> Path | None:
        """The folder or .gguf file of the original."""

    @property
    def remote_code(self) -> bool: ...

    def original(
        self, *, dtype: torch.dtype | None = None, batch: int | None = None, name: str | None = None
    ) -> Source: ...


@dataclass(frozen=True)
class Variation:
    """Another way to compute the original; a call opens the model."""

    name: str
    open: Callable[[], Source]

    def __call__(self) -> Source:
        return self.open()


def variations(original: Source, opener: Opener, windows: Tensor) -> tuple[list[Variation], list[str]]:
    """Other batches, another dtype and another engine (transformers), and notes about those that cannot be run.

    original  the model as it is compared with other models
    windows   (S, T) int64, the sequences on which it is run
    """
    folder = opener.base
    assert folder is not None, "there is an original"
    made = [_dtype(original, folder, opener)]
    notes = []
    if len(windows) > 1:
        made.insert(0, _batch(opener, windows))
    else:
        notes.append("the floor of another batch size was not measured: there is only one sequence")
    refusal = _no_engine(original, folder, windows)
    if refusal is None:
        made.append(_engine(original, folder, remote_code=opener.remote_code))
    else:
        notes.append(f"the floor of another engine was not measured: {refusal}")
    return made, notes


def _batch(opener: Opener, windows: Tensor) -> Variation:
    usual = min(windows_per_batch(windows), len(windows))
    other = 1 if usual > 1 else 2
    name = f"batches of {other} instead of {usual}"
    return Variation(name, lambda: opener.original(batch=other, name=name))


def _dtype(original: Source, folder: Path, opener: Opener) -> Variation:
    other = torch.float32
    if original.dtype == torch.float32:
        stored = torch.float32 if is_file(folder) else stored_dtype(Checkpoint.open(folder))
        other = torch.bfloat16 if stored == torch.float32 else stored
    name = f"{_name(other)} instead of {_name(original.dtype)}"
    return Variation(name, lambda: opener.original(dtype=other, name=name))


def _engine(original: Source, folder: Path, *, remote_code: bool) -> Variation:
    def opened() -> Source:
        return Whole(
            folder, original.device, original.dtype, remote_code=remote_code, attention="eager", why="as another engine"
        )

    return Variation("transformers with eager attention instead of llmq", opened)


def _no_engine(original: Source, folder: Path, windows: Tensor) -> str | None:
    """The reason why transformers cannot run the model as another engine; None if it can."""
    if not isinstance(original, Streamed):
        return "transformers runs the original already"
    if is_file(folder):
        return "the original is a .gguf file"
    free = memory.spare(original.device)
    if original.device.type == "cpu":  # the hidden states of two models are there as well
        free -= 2 * original.state_bytes(windows.numel())
    if original.whole_bytes > WHOLE_PART * free:
        return f"the original needs {original.whole_bytes / 1e9:.1f} GB of memory, {max(0, free) / 1e9:.1f} GB are free"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
