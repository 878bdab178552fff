"""Hidden states of a text's windows, in memory or in a file: what is computed once and read many times.

In the file each window has its place, one after the other, as raw values: windows are read in any order, a few at a
time, and only those are in memory.  (A memory map would count in full against a limit on address space.)
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.atomic import storing
from llmq.checkpoint.safetensors_files import reading


class StoredWindows:
    """Hidden states (…, 1, T, D), one a window; they lie in `file`, or in memory where there is none."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._held: dict[int, Tensor] = {}
        self._empty: Tensor | None = None  # on meta: shape and dtype of each

    def read(self, windows: Sequence[int]) -> Tensor:
        """(…, B, T, D) of B windows that were written, on the CPU.  Raises CheckpointError."""
        return torch.cat([self._read(window) for window in windows], dim=-3)

    def write(self, windows: Sequence[int], hidden: Tensor) -> None:
        """Keep `hidden` (…, B, T, D) for B windows.  Raises StorageError."""
        for window, each in zip(windows, hidden.detach().cpu().split(1, dim=-3), strict=True):
            self._empty = each.to("meta")
            if self._file is None:
                self._held[window] = each.clone()
                continue
            with storing(self._file):
                self._file.touch()
                with self._file.open("rb+") as file:
                    file.seek(window * each.nbytes)
                    file.write(each.contiguous().flatten().view(torch.uint8).numpy().data)

    def _read(self, window: int) -> Tensor:
        if self._file is None:
            return self._held[window]
        assert self._empty is not None, "written before it is read"
        data = torch.empty(self._empty.nbytes, dtype=torch.uint8)
        with reading(self._file), self._file.open("rb") as file:
            file.seek(window * len(data))
            if file.readinto(data.numpy().data) != len(data):
                raise OSError(f"it ends before window {window} does")
        return data.view(self._empty.dtype).reshape(self._empty.shape)
