"""The tuned version of all committed blocks: the files that end-to-end tuning keeps on disk.

    OUT/.llmq-partial/revision/
        state.NAME.350.safetensors   the tuned parameters of the weight NAME, before step 350
        block.00003.300.safetensors  the packed weights of block 3, before step 300
        progress.json                the step to continue from, the best step so far, and the valid files
        adopted.json                 the step whose blocks replace the committed blocks, or none; ends the tuning

Files are never modified: the next step writes new ones. If the process is killed at any time, the files that
progress.json names are complete and belong to one step. Files are flushed to disk just before progress.json or
adopted.json names them; until then they may exist only in the cache of the system. Both documents hold the checksums of
the tensors in the files that they name.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.atomic import storing, sync_file, sync_folder
from llmq.checkpoint.confined import confined
from llmq.checkpoint.recorded_tensors import StoredTensors, read_recorded, require_unchanged
from llmq.checkpoint.safetensors_files import Part, write_tensors
from llmq.checkpoint.sealed import read_sealed, write_sealed
from llmq.errors import CheckpointError

Progress = Mapping[str, Any]  # "step" and "best" are read here; all other keys are kept


class Revision:
    """The folder `revision` of a staging folder; it may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._progress = folder / "progress.json"
        self._adopted = folder / "adopted.json"
        self._valid_files: frozenset[str] = frozenset()  # the files that the last record names
        self._checksums: dict[str, dict[str, str]] = {}  # of the tensors of each file that was written, by file name

    @property
    def progress(self) -> Progress | None:
        """The record of the last `save`, or None."""
        return read_sealed(self._progress)

    @property
    def adopted(self) -> Progress | None:
        """The record of `adopt`, or None."""
        return read_sealed(self._adopted)

    def sweep(self) -> None:
        """Delete the files that no record names; all files if a named file is damaged."""
        record = self.adopted or self.progress
        if record is None or not self._is_complete(record):
            if self.folder.exists():
                self._adopted.unlink(missing_ok=True)  # first, because it must never name deleted files
                self._progress.unlink(missing_ok=True)
                shutil.rmtree(self.folder)
            return
        self._checksums = dict(record["checksums"])
        self._set_valid_files(record)
        for file in self.folder.iterdir():
            self._drop(file)

    def begin(self) -> None:
        """Create the folder."""
        with storing(self.folder):
            self.folder.mkdir(exist_ok=True)

    def write_state(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tuned parameters of a weight. Raises StorageError."""
        self._write(self._state(name, step), tensors)

    def read_state(self, name: str, step: int) -> StoredTensors:
        """Open the tensors of `write_state`; each access reads from disk. Raises CheckpointError."""
        file = self._state(name, step)
        return StoredTensors(file, self._checksums[file.name])

    def write_block(self, index: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the packed weights of a block under their names in the model. Raises StorageError."""
        self._write(self._block(index, step), tensors)

    def drop_blocks(self, indices: Iterable[int], step: int) -> None:
        """Delete blocks, unless the last `save` named them."""
        for index in indices:
            self._drop(self._block(index, step))

    def save(self, record: Progress, names: Iterable[str], blocks: Iterable[int]) -> None:
        """Record that tuning continues from step `record["step"]`, and delete older files.

        names   the weights whose states were written at that step
        blocks  the blocks that were written at step `record["best"]`; empty if that is None
        """
        states = [self._state(name, record["step"]).name for name in names]
        self._name(self._progress, record, states, blocks)

    def adopt(self, record: Progress, blocks: Iterable[int]) -> None:
        """Replace the committed blocks by the blocks of step `record["best"]`; None keeps the committed blocks."""
        self._name(self._adopted, record, [], blocks)

    def parts(self, index: int) -> list[Part]:
        """Where the tensors are that replace those of block `index`; empty if nothing was adopted."""
        record = self.adopted
        if record is None or record["best"] is None:
            return []
        file = self._block(index, record["best"])
        if file.name not in record["checksums"]:  # nothing in this block was tuned
            return []
        return [(file, name, info) for name, info in read_recorded(file, record["checksums"][file.name]).items()]

    def _name(self, mark: Path, record: Progress, states: list[str], blocks: Iterable[int]) -> None:
        best = [] if record["best"] is None else [self._block(index, record["best"]).name for index in blocks]
        with storing(self.folder):
            for file in (*states, *best):
                sync_file(self.folder / file)
            sync_folder(self.folder)
            checksums = {file: self._checksums[file] for file in (*states, *best)}
            named = {**record, "states": states, "blocks": best, "checksums": checksums}
            write_sealed(mark, named)
            self._set_valid_files(named)
            for written in self.folder.glob("*.safetensors"):
                self._drop(written)

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        self._checksums[file.name] = write_tensors(file, tensors, durable=False)

    def _set_valid_files(self, record: Progress) -> None:
        self._valid_files = frozenset((*record["states"], *record["blocks"], self._progress.name, self._adopted.name))

    def _drop(self, file: Path) -> None:
        if file.name not in self._valid_files:
            self._checksums.pop(file.name, None)
            with storing(file):
                file.unlink(missing_ok=True)

    def _is_complete(self, record: Progress) -> bool:
        if not all(confined(self.folder, file) for file in (*record["states"], *record["blocks"])):
            return False
        try:
            for file in (*record["states"], *record["blocks"]):
                require_unchanged(self.folder / file, record["checksums"][file])
        except CheckpointError:
            return False
        return True

    def _state(self, name: str, step: int) -> Path:
        return self.folder / f"state.{name}.{step}.safetensors"

    def _block(self, index: int, step: int) -> Path:
        return self.folder / f"block.{index:05d}.{step}.safetensors"
