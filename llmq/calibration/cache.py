"""Text that the model wrote, kept beside the finished blocks until the run is over.

A run that was interrupted must go on with the same windows.  Written a second time, with other memory free and so in
other batches, one token may come out differently by a rounding, and all that follow it; and it would take as long
again.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from llmq._version import __version__
from llmq.checkpoint.atomic import write_text


class OwnText:
    """The windows that were written for one request at a time.

    folder  the run's staging
    model   a fingerprint
    name    of the file, without its ending
    """

    def __init__(self, folder: Path, model: str, name: str = "self") -> None:
        self._file = folder / f"{name}.json"
        self._model = model
        self._unsaved = ""

    def find(self, windows: int, seqlen: int, seed: int) -> Tensor | None:
        """(windows, seqlen) int64 as an earlier run wrote them; None where none did, or the file was cut short."""
        try:
            found = json.loads(self._file.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("request") != self._request(windows, seqlen, seed):
            return None
        return torch.tensor(found["windows"], dtype=torch.int64)

    def remember(self, windows: Tensor, seed: int) -> None:
        """Have windows (S, T) saved when there is a folder for them."""
        count, seqlen = windows.shape
        request = self._request(count, seqlen, seed)
        self._unsaved = json.dumps({"request": request, "windows": windows.tolist()})

    def save(self) -> None:
        """Write what was remembered, if anything was; the folder must be there.  Raises StorageError."""
        if self._unsaved:
            write_text(self._file, self._unsaved)
            self._unsaved = ""

    def _request(self, windows: int, seqlen: int, seed: int) -> list[object]:
        return [__version__, torch.__version__, self._model, windows, seqlen, seed]
