"""The finished blocks of a run in progress, kept inside the output folder.

    OUT/.llmq-partial/
        identity.json       the settings and the source of the run
        00000.safetensors   the tensors of block 0, under their names in the finished model
        00000.json          the record of block 0; written last, so it marks the block as committed
        revision/           the tuned version of all blocks (see tuned_version.py)
        final/              the model while it is assembled
        scratch/            an intermediate model from which the model in final/ is made
        activations/        hidden states of the calibration text that do not fit into memory
        self.json           text that the model generated (see calibration/cache.py)
        moving.json         the files of final/ that may already be in OUT; written before the first file is moved

The staging folder is inside OUT because OUT may be a mount point, and a rename is atomic only within a file system.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.atomic import PARTIAL, sync_folder, write_text
from llmq.checkpoint.index import read_json_object
from llmq.checkpoint.safetensors_files import Part, StoredTensors, read_header, write_tensors
from llmq.checkpoint.tuned_version import Revision
from llmq.errors import CheckpointError

STAGING = ".llmq-partial"


class Staging:
    """The staging folder of an output folder; it may not exist yet.

    The methods raise OSError; `Writer` turns it into a StorageError.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / STAGING
        self.final = self.folder / "final"
        self.scratch = self.folder / "scratch"
        self.activations = self.folder / "activations"
        self.revision = Revision(self.folder / "revision")
        self._identity = self.folder / "identity.json"
        self._moving = self.folder / "moving.json"

    def exists(self) -> bool:
        return self.folder.exists()

    def belongs_to(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder belongs to a run with this identity."""
        return bool(read_or_empty(self._identity).get("identity") == _plain(identity))

    @property
    def created_out(self) -> bool:
        """Whether the run created the output folder."""
        return read_or_empty(self._identity).get("created_out") is True

    def begin(self, identity: Mapping[str, Any], *, created_out: bool) -> None:
        """Create the folder, and record the identity of the run."""
        self.folder.mkdir()
        sync_folder(self.out)
        state = {"identity": _plain(identity), "created_out": created_out}
        write_text(self._identity, json.dumps(state, indent=1))

    def sweep(self) -> None:
        """Delete the incomplete files of a killed process, also those that it moved to OUT."""
        for partial in self.folder.glob(f".*{PARTIAL}"):
            partial.unlink()
        self.revision.sweep()
        for name in self.moved():
            moved = self.out / name
            moved.unlink(missing_ok=True)
            if moved.parent != self.out and moved.parent.is_dir() and not any(moved.parent.iterdir()):
                moved.parent.rmdir()
        self._moving.unlink(missing_ok=True)
        for folder in (self.final, self.scratch, self.activations):
            if folder.exists():
                shutil.rmtree(folder)

    def drop_damaged(self) -> list[int]:
        """Mark blocks with unreadable files as not committed, and return them."""
        damaged = []
        for index in self.blocks():
            try:
                self.read(index)
            except CheckpointError:
                damaged.append(index)
                self._mark(index).unlink()
        return damaged

    def remove(self) -> None:
        """Delete the folder. The identity is deleted first, so that a crash does not leave a run to continue."""
        self._identity.unlink(missing_ok=True)
        sync_folder(self.folder)
        shutil.rmtree(self.folder)

    def nbytes(self) -> int:
        """The size of the folder and of the files moved out of it, in bytes."""
        files = [*self.folder.rglob("*"), *(self.out / name for name in self.moved())]
        return sum(file.stat().st_size for file in files if file.is_file())

    def has_text(self) -> bool:
        """Whether there is text that the model generated, which may have taken hours."""
        files = {file for file in self.folder.glob("*.json") if not file.stem.isdecimal()}
        return self._identity.exists() and bool(files - {self._identity, self._moving})

    def blocks(self) -> list[int]:
        """The committed blocks, in order."""
        return sorted(int(mark.stem) for mark in self.folder.glob("*.json") if mark.stem.isdecimal())

    def commit(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a block, its record last. An existing block is replaced, and is not committed meanwhile."""
        if self._mark(index).exists():
            self._mark(index).unlink()
            sync_folder(self.folder)  # otherwise a power cut may leave the old record with the new tensors
        write_tensors(self._tensors(index), tensors)
        write_text(self._mark(index), json.dumps(record, indent=1))

    def read(self, index: int) -> tuple[StoredTensors, dict[str, Any]]:
        """Read a committed block and its record. Raises CheckpointError if it is missing or damaged."""
        record = read_json_object(self._mark(index))
        return StoredTensors(self._tensors(index)), record

    def parts(self, blocks: Iterable[int]) -> list[Part]:
        """Where every tensor of these blocks is, block by block; the tuned version if there is one.

        Raises CheckpointError if a block is damaged.
        """
        parts: list[Part] = []
        for index in blocks:
            file = self._tensors(index)
            revised = {name: (source, name, info) for source, name, info in self.revision.parts(index)}
            parts += [revised.get(name, (file, name, info)) for name, info in read_header(file).items()]
        return parts

    def announce(self, names: list[str]) -> None:
        """Record the files of OUT that belong to this run from now on."""
        write_text(self._moving, json.dumps({"files": names}))

    def moved(self) -> list[str]:
        """The files of OUT that an interrupted `Writer.finishing` may have moved there."""
        return list(read_or_empty(self._moving).get("files", []))

    def _tensors(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _mark(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"


def _plain(identity: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(identity))  # as JSON returns it: lists for tuples, text for keys


def read_or_empty(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # missing, or truncated by a power cut, which counts as missing
        return {}
    return document if isinstance(document, dict) else {}
