"""The tensors of a file of the staging folder, compared with the checksums that were recorded when it was written."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llmq.checkpoint.safetensors_files import REPEAT, TensorInfo, checked, read_header, read_tensor
from llmq.errors import CheckpointError


def read_recorded(path: Path, checksums: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Read a header as `read_header` does, with the checksums that `write_tensors` returned, by the names of tensors.

    Raises CheckpointError also if the file has other tensors.
    """
    header = read_header(path)
    if header.keys() != checksums.keys():
        raise CheckpointError(f"{path} is damaged: its tensors have other names than when it was written", hint=REPEAT)
    return {name: replace(info, sha256=checksums[name]) for name, info in header.items()}


def require_unchanged(path: Path, checksums: Mapping[str, str]) -> None:
    """Read a whole file; raises CheckpointError if it differs from what was written."""
    for info in read_recorded(path, checksums).values():
        for _ in checked(path, info):
            pass


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file that `write_tensors` wrote with these checksums; each access reads from disk."""

    def __init__(self, path: Path, checksums: Mapping[str, str]) -> None:
        self._path = path
        self._header = read_recorded(path, checksums)

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._path, self._header[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)

    def __contains__(self, name: object) -> bool:  # the inherited method would read the tensor
        return name in self._header
