"""The finished blocks of a run that is not over, kept inside the output folder.

    OUT/.llmq-partial/
        identity.json       what the run was asked for, and of which source
        00000.safetensors   the tensors of block 0, under the names that they have in the finished model
        00000.json          its record; written last, so it marks the block as committed
        revision/           a second version of all blocks, in the making (see revision.py)
        final/              the model while it is put together
        scratch/            a model that the one in final/ is made from, and that nobody asked for
        activations/        hidden states of the calibration text that do not fit into memory
        moving.json         the files of final/ that may already be in OUT; written before the first of them is moved

It lies inside OUT because OUT may be a mount point, and a rename is atomic only within a file system.
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
    """The staging folder of one output folder; may not exist yet.

    Its methods let OSErrors of the system through; `Writer` names them.
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
        """Whether a run with this identity left it."""
        return bool(read_or_empty(self._identity).get("identity") == _plain(identity))

    @property
    def created_out(self) -> bool:
        """Whether the run made the output folder."""
        return read_or_empty(self._identity).get("created_out") is True

    def begin(self, identity: Mapping[str, Any], *, created_out: bool) -> None:
        """Make it, and write down whose it is."""
        self.folder.mkdir()
        sync_folder(self.out)
        state = {"identity": _plain(identity), "created_out": created_out}
        write_text(self._identity, json.dumps(state, indent=1))

    def sweep(self) -> None:
        """Delete what a killed process left half done, also the files that it moved to OUT."""
        for partial in self.folder.glob(f".*{PARTIAL}"):
            partial.unlink()
        self.revision.sweep()
        for name in self.moved():
            moved = self.out / name
            moved.unlink(missing_ok=True)
            if moved.parent != self.out and moved.parent.is_dir() and not any(moved.parent.iterdir()):
                moved.parent.rmdir()
        self._moving.unlink(missing_ok=True)
        for made in (self.final, self.scratch, self.activations):
            if made.exists():
                shutil.rmtree(made)

    def drop_damaged(self) -> list[int]:
        """Take back the commitment of blocks whose files do not read back; returns which."""
        damaged = []
        for index in self.blocks():
            try:
                self.read(index)
            except CheckpointError:
                damaged.append(index)
                self._mark(index).unlink()
        return damaged

    def remove(self) -> None:
        """Delete it.  The identity goes first: what is left after a crash must not be taken for a run to continue."""
        self._identity.unlink(missing_ok=True)
        sync_folder(self.folder)
        shutil.rmtree(self.folder)

    def nbytes(self) -> int:
        """Bytes on the disk that it, and what was moved out of it, take."""
        files = [*self.folder.rglob("*"), *(self.out / name for name in self.moved())]
        return sum(file.stat().st_size for file in files if file.is_file())

    def blocks(self) -> list[int]:
        """The committed blocks, in order."""
        return sorted(int(mark.stem) for mark in self.folder.glob("*.json") if mark.stem.isdecimal())

    def commit(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a block, its mark last.  A block that stands already is replaced, and is missing meanwhile."""
        if self._mark(index).exists():
            self._mark(index).unlink()
            sync_folder(self.folder)  # or a power cut might leave the old mark beside the new tensors
        write_tensors(self._tensors(index), tensors)
        write_text(self._mark(index), json.dumps(record, indent=1))

    def read(self, index: int) -> tuple[StoredTensors, dict[str, Any]]:
        """A committed block and its record.  Raises CheckpointError if it is not there or damaged."""
        record = read_json_object(self._mark(index))
        return StoredTensors(self._tensors(index)), record

    def parts(self, blocks: Iterable[int]) -> list[Part]:
        """Where every tensor of these blocks lies, block by block, a revision's where it has one.

        Raises CheckpointError if one is damaged.
        """
        found: list[Part] = []
        for index in blocks:
            file = self._tensors(index)
            revised = {name: (source, name, info) for source, name, info in self.revision.parts(index)}
            found += [revised.get(name, (file, name, info)) for name, info in read_header(file).items()]
        return found

    def announce(self, names: list[str]) -> None:
        """Write down which files of OUT are this run's from now on."""
        write_text(self._moving, json.dumps({"files": names}))

    def moved(self) -> list[str]:
        """The files of OUT that an interrupted `Writer.finishing` may have moved there."""
        return list(read_or_empty(self._moving).get("files", []))

    def _tensors(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _mark(self, index: int) -> Path:
        return self.folder / f"{index:05d}.json"


def _plain(identity: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(identity))  # as it comes back from the disk: lists for tuples, text for keys


def read_or_empty(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # absent, or cut short by a power cut, which is as good as absent
        return {}
    return document if isinstance(document, dict) else {}
