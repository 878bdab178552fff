"""The finished blocks of a run in progress, kept inside the output folder.

    OUT/.llmq-partial/
        identity.json       the settings and the source of the run
        00000.safetensors   the tensors of block 0, under their names in the finished model
        00000.json          the record of block 0 and the checksums of its tensors; written last, so it marks the block
                            as committed
        revision/           the tuned version of all blocks (see tuned_version.py)
        final/              the model while it is assembled
        scratch/            an intermediate model from which the model in final/ is made
        activations/        hidden states of the calibration text that do not fit into memory
        report.html         the report so far, for people; nothing reads it
        training/           the start and the last checkpoint of a training (see training/)
        self.json           text that the model generated (see calibration/cache.py)
        moving.json         the files of final/ that may already be in OUT; written before the first file is moved

The staging folder is inside OUT because OUT may be a mount point, and a rename is atomic only within a file system.

Nothing in the folder is trusted when a run continues. Every document and every tensor has a checksum, and what does not
match is computed again. Paths that a document names must be inside OUT.

The folder is removed by renaming it to OUT/.llmq-removed, which is atomic, and deleting that. So a run that was killed
meanwhile leaves either a run that continues, or files that any later run deletes.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.atomic import PARTIAL, sync_folder
from llmq.checkpoint.confined import confined
from llmq.checkpoint.recorded_tensors import StoredTensors, read_recorded, require_unchanged
from llmq.checkpoint.safetensors_files import REPEAT, Part, write_tensors
from llmq.checkpoint.sealed import read_sealed, sha256_of, write_sealed
from llmq.checkpoint.tuned_version import Revision
from llmq.errors import CheckpointError

STAGING = ".llmq-partial"
REMOVED = ".llmq-removed"


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
        self.training = self.folder / "training"
        self.report_page = self.folder / "report.html"
        self.revision = Revision(self.folder / "revision")
        self._identity = self.folder / "identity.json"
        self._moving = self.folder / "moving.json"

    def exists(self) -> bool:
        return self.folder.exists()

    def belongs_to(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder belongs to a run with this identity."""
        return (read_sealed(self._identity) or {}).get("identity") == sha256_of(identity)

    def has_identity(self) -> bool:
        """Whether it is known which run the folder belongs to."""
        return read_sealed(self._identity) is not None

    @property
    def created_out(self) -> bool:
        """Whether the run created the output folder."""
        return (read_sealed(self._identity) or {}).get("created_out") is True

    def begin(self, identity: Mapping[str, Any], *, created_out: bool) -> None:
        """Create the folder, and record the identity of the run."""
        self.folder.mkdir()
        sync_folder(self.out)
        write_sealed(self._identity, {"identity": sha256_of(identity), "created_out": created_out, "run": identity})

    def sweep(self) -> None:
        """Delete the incomplete files of a killed process, also those that it moved to OUT."""
        for partial in self.folder.glob(f".*{PARTIAL}"):
            partial.unlink()
        self.revision.sweep()
        for name in self.moved():
            moved = self.out / name
            if not moved.parent.resolve().is_relative_to(self.out.resolve()):
                continue  # a folder was replaced by a symbolic link
            moved.unlink(missing_ok=True)
            if moved.parent != self.out and moved.parent.is_dir() and not any(moved.parent.iterdir()):
                moved.parent.rmdir()
        self._moving.unlink(missing_ok=True)
        for folder in (self.final, self.scratch, self.activations):
            if folder.exists():
                shutil.rmtree(folder)

    def drop_damaged(self) -> list[int]:
        """Read all blocks, mark those that differ from what was committed as not committed, and return them."""
        damaged = []
        for index in self.blocks():
            try:
                require_unchanged(self._tensors(index), self._committed(index)["checksums"])
            except CheckpointError:
                damaged.append(index)
                self._mark(index).unlink()
        return damaged

    def remove(self) -> None:
        """Delete the folder, which is not there from the first moment."""
        self.clean()
        self.folder.rename(self.out / REMOVED)
        sync_folder(self.out)
        self.clean()

    def clean(self) -> None:
        """Delete what a killed process has left of a removed folder."""
        if (self.out / REMOVED).exists():
            shutil.rmtree(self.out / REMOVED)

    def nbytes(self) -> int:
        """The size of the folder and of the files moved out of it, in bytes."""
        files = [*self.folder.rglob("*"), *(self.out / name for name in self.moved())]
        return sum(file.stat().st_size for file in files if file.is_file())

    def has_work(self) -> bool:
        """Whether there is text that the model generated, or a training, which may have taken hours."""
        if self.training.exists():
            return True
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
        checksums = write_tensors(self._tensors(index), tensors)
        write_sealed(self._mark(index), {"checksums": checksums, "record": record})

    def read(self, index: int) -> tuple[StoredTensors, dict[str, Any]]:
        """Read a committed block and its record. Raises CheckpointError if it is missing or damaged."""
        committed = self._committed(index)
        return StoredTensors(self._tensors(index), committed["checksums"]), committed["record"]

    def _committed(self, index: int) -> dict[str, Any]:
        committed = read_sealed(self._mark(index))
        if committed is None:
            raise CheckpointError(f"{self._mark(index)} is missing or damaged", hint=REPEAT)
        return committed

    def parts(self, blocks: Iterable[int]) -> list[Part]:
        """Where every tensor of these blocks is, block by block; the tuned version if there is one.

        Raises CheckpointError if a block is damaged.
        """
        parts: list[Part] = []
        for index in blocks:
            file = self._tensors(index)
            revised = {name: (source, name, info) for source, name, info in self.revision.parts(index)}
            infos = read_recorded(file, self._committed(index)["checksums"])
            parts += [revised.get(name, (file, name, info)) for name, info in infos.items()]
        return parts

    def announce(self, names: list[str]) -> None:
        """Record the files of OUT that belong to this run from now on."""
        write_sealed(self._moving, {"files": names})

    def moved(self) -> list[str]:
        """The files of OUT that an interrupted `Writer.finishing` may have moved there."""
        names = (read_sealed(self._moving) or {}).get("files")
        return [name for name in names if confined(self.out, name)] if isinstance(names, list) else []

    def _tensors(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _mark(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"


def read_or_empty(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; empty if there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # missing, or truncated by a power cut, which counts as missing
        return {}
    return document if isinstance(document, dict) else {}
