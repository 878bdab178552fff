"""Text that the model generated, kept next to the finished blocks until the run is finished.

An interrupted run must continue with the same sequences. If the text were generated again, with other batches because
of other free memory, rounding might change one token and all that follow, and it would take as long again.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from llmq._version import __version__
from llmq.checkpoint.atomic import write_text


class OwnText:
    """The sequences that were generated for one request.

    folder  the staging folder of the run
    model   the fingerprint of the model
    name    the name of the file, without its suffix
    """

    def __init__(self, folder: Path, model: str, name: str = "self") -> None:
        self._file = folder / f"{name}.json"
        self._model = model
        self._unsaved = ""

    def find(self, windows: int, seqlen: int, seed: int) -> Tensor | None:
        """What `remember` was given in an earlier run, int64; None if there is nothing, or the file is truncated."""
        try:
            document = json.loads(self._file.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if not isinstance(document, dict) or document.get("request") != self._request(windows, seqlen, seed):
            return None
        return torch.tensor(document["windows"], dtype=torch.int64).view(-1, seqlen)

    def remember(self, text: Tensor, windows: int, seed: int) -> None:
        """Keep what was generated, (S, T), for the next `save`: as many sequences as were asked for, or none."""
        request = self._request(windows, text.shape[1], seed)
        self._unsaved = json.dumps({"request": request, "windows": text.tolist()})

    def save(self) -> None:
        """Write the remembered sequences, if there are any; the folder must exist. Raises StorageError."""
        if self._unsaved:
            write_text(self._file, self._unsaved)
            self._unsaved = ""

    def _request(self, windows: int, seqlen: int, seed: int) -> list[object]:
        return [__version__, torch.__version__, self._model, windows, seqlen, seed]
