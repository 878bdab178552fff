"""Hidden states of many sequences between two blocks: one store, and one policy for where they are kept.

    device  ──does not fit──►  main memory (pinned for a GPU)  ──does not fit──►  a file in the staging folder

The place changes no bit. A file contains the raw values of all sequences, one after the other; sequences can be read in
any order, and only those that are read are in memory. (A memory map is not used, because all of it would count against
a limit on address space.)
"""

import enum
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmq import memory
from llmq.checkpoint.atomic import storing
from llmq.checkpoint.safetensors_files import reading
from llmq.memory import HOST, Economy

DEVICE_SHARE, HOST_SHARE = 4, 2  # hidden states may take a quarter of free GPU memory, half of free host memory


class Place(enum.Enum):
    """A place for hidden states."""

    DEVICE = "the compute device"
    HOST = "main memory"
    FILE = "a file"


@dataclass(frozen=True)
class Storage:
    """Where hidden states are kept: on `device`, in main memory, or in files in `folder`."""

    device: torch.device
    place: Place = Place.DEVICE
    folder: Path | None = None

    @classmethod
    def choose(
        cls, nbytes: int, device: torch.device, folder: Path | None = None, economy: Economy = Economy.NONE
    ) -> "Storage":
        """The storage for `nbytes` of hidden states; without a folder the last choice is main memory."""
        if economy >= Economy.STATES_IN_MAIN_MEMORY:
            in_files = economy >= Economy.STATES_IN_FILES and folder is not None
            return cls(device, Place.FILE if in_files else Place.HOST, folder)
        if device.type != HOST.type and nbytes <= memory.spare(device) // DEVICE_SHARE:
            return cls(device, Place.DEVICE, folder)
        if nbytes <= memory.spare(HOST) // HOST_SHARE or folder is None:
            return cls(device, Place.HOST, folder)
        return cls(device, Place.FILE, folder)

    @property
    def takes_device_memory(self) -> bool:
        """Whether hidden states are kept in the memory of `device`; for a CPU this is main memory."""
        return self.place is Place.DEVICE or (self.place is Place.HOST and self.device.type == HOST.type)


class HiddenStates:
    """(…, S, T, D): the hidden states of S sequences, written and read by the numbers of the sequences.

    name  the name of the file, if they are kept in one
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._file = storage.folder / name if storage.place is Place.FILE and storage.folder is not None else None
        self._parts: dict[int, tuple[Tensor, int]] = {}  # by sequence: a tensor of several sequences, and the row in it
        self._empty: Tensor | None = None  # (…, 1, T, D) on meta: shape and dtype of one sequence

    def __bool__(self) -> bool:
        """Whether anything was written."""
        return self._empty is not None

    def write(self, sequences: Sequence[int], hidden: Tensor) -> None:
        """Store `hidden` (…, B, T, D) for B sequences. Raises StorageError."""
        hidden = hidden.detach()
        self._empty = hidden.narrow(-3, 0, 1).to("meta")
        if self._file is not None:
            self._write_file(sequences, hidden.cpu())
            return
        if self._storage.place is Place.HOST and hidden.device.type != HOST.type:
            hidden = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden)
        self._parts.update({sequence: (hidden, row) for row, sequence in enumerate(sequences)})

    def read(self, sequences: Sequence[int]) -> Tensor:
        """(…, B, T, D) of B stored sequences, on the compute device. Raises CheckpointError."""
        if self._file is not None:
            parts = [self._read_file(sequence) for sequence in sequences]
        else:
            parts = list(self._runs(sequences))
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)
        return hidden.to(self._storage.device, non_blocking=True)

    def clear(self) -> None:
        """Free the memory, or delete the file."""
        self._parts, self._empty = {}, None
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _runs(self, sequences: Sequence[int]) -> Iterator[Tensor]:
        """Parts of the result; consecutive rows of one tensor are one part."""
        places = [self._parts[sequence] for sequence in sequences]
        ordered = [(tensor, row, row - position) for position, (tensor, row) in enumerate(places)]
        for _, run in itertools.groupby(ordered, key=lambda place: (id(place[0]), place[2])):
            rows = list(run)
            yield rows[0][0].narrow(-3, rows[0][1], len(rows))

    def _write_file(self, sequences: Sequence[int], hidden: Tensor) -> None:
        assert self._file is not None
        with storing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
            with self._file.open("rb+") as file:
                for sequence, state in zip(sequences, hidden.split(1, dim=-3), strict=True):
                    file.seek(sequence * state.nbytes)
                    file.write(state.contiguous().flatten().view(torch.uint8).numpy().data)

    def _read_file(self, sequence: int) -> Tensor:
        assert self._file is not None and self._empty is not None, "written before it is read"
        data = torch.empty(self._empty.nbytes, dtype=torch.uint8)
        with reading(self._file), self._file.open("rb") as file:
            file.seek(sequence * len(data))
            if file.readinto(data.numpy().data) != len(data):
                raise OSError(f"the file ends before the end of sequence {sequence}")
        return data.view(self._empty.dtype).reshape(self._empty.shape)
