"""A second version of all committed blocks, in the making: what end-to-end tuning needs on the disk.

    OUT/.llmq-partial/revision/
        state.NAME.350.safetensors   what is tuned of the weight NAME, as it was before step 350
        block.00003.300.safetensors  the packed weights of block 3, as they were before step 300
        progress.json                the step to continue from, and the one whose blocks were best; which files count
        adopted.json                 the step whose blocks take the place of the committed ones, or none; the end

A file is never changed once it is written: the next step writes another.  So whatever is killed whenever, the files
that progress.json speaks of are whole, and together they are one moment.  Files are pushed to the disk just before
progress.json or adopted.json names them, not before: between two such moments they may well live in the system's cache.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.atomic import storing, sync_file, sync_folder, write_text
from llmq.checkpoint.safetensors_files import Part, StoredTensors, read_header, write_tensors
from llmq.errors import CheckpointError

Progress = Mapping[str, Any]  # "step" and "best" are read here, and whatever else JSON can hold is kept


class Revision:
    """The folder `revision` of a staging folder; may not exist yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._progress = folder / "progress.json"
        self._adopted = folder / "adopted.json"
        self._counted: frozenset[str] = frozenset()  # the files that a record of this process speaks of

    @property
    def progress(self) -> Progress | None:
        """What the last call of `save` was given; None where there was none."""
        return _read(self._progress)

    @property
    def adopted(self) -> Progress | None:
        """What `adopt` was given; None where it was not called."""
        return _read(self._adopted)

    def sweep(self) -> None:
        """Delete what no record speaks of; all of it where what they speak of is damaged."""
        record = self.adopted or self.progress
        if record is None or not self._whole(record):
            if self.folder.exists():
                self._adopted.unlink(missing_ok=True)  # first: what it names may be gone before it otherwise
                self._progress.unlink(missing_ok=True)
                shutil.rmtree(self.folder)
            return
        self._count(record)
        for file in self.folder.iterdir():
            self._drop(file)

    def begin(self) -> None:
        """Make the folder."""
        with storing(self.folder):
            self.folder.mkdir(exist_ok=True)

    def write_state(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what is tuned of a weight.  Raises StorageError."""
        write_tensors(self._state(name, step), tensors, durable=False)

    def read_state(self, name: str, step: int) -> StoredTensors:
        """What `write_state` was given, each tensor read when it is asked for.  Raises CheckpointError."""
        return StoredTensors(self._state(name, step))

    def drop_state(self, name: str, step: int) -> None:
        """Delete it, unless the last `save` named it."""
        self._drop(self._state(name, step))

    def write_block(self, index: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the packed weights of a block under the names that they have in the model.  Raises StorageError."""
        write_tensors(self._block(index, step), tensors, durable=False)

    def drop_blocks(self, indices: Iterable[int], step: int) -> None:
        """Delete them, unless the last `save` named them."""
        for index in indices:
            self._drop(self._block(index, step))

    def save(self, record: Progress, names: Iterable[str], blocks: Iterable[int]) -> None:
        """From now on, what was written is continued from step `record["step"]`; what came before goes.

        names   of the weights whose states at that step were written
        blocks  that were written at step `record["best"]`; none where that is None
        """
        states = [self._state(name, record["step"]).name for name in names]
        self._name(self._progress, record, states, blocks)

    def adopt(self, record: Progress, blocks: Iterable[int]) -> None:
        """From now on, the blocks at step `record["best"]` stand for the committed ones; None leaves those."""
        self._name(self._adopted, record, [], blocks)

    def parts(self, index: int) -> list[Part]:
        """Where the tensors lie that stand for some of block `index`; none where nothing was adopted."""
        record = self.adopted
        if record is None or record["best"] is None:
            return []
        file = self._block(index, record["best"])
        return [(file, name, info) for name, info in read_header(file).items()] if file.exists() else []

    def _name(self, mark: Path, record: Progress, states: list[str], blocks: Iterable[int]) -> None:
        best = [] if record["best"] is None else [self._block(index, record["best"]).name for index in blocks]
        with storing(self.folder):
            for file in (*states, *best):
                sync_file(self.folder / file)
            sync_folder(self.folder)
            named = {**record, "states": states, "blocks": best}
            write_text(mark, json.dumps(named))
            self._count(named)
            for written in self.folder.glob("*.safetensors"):
                self._drop(written)

    def _count(self, record: Progress) -> None:
        self._counted = frozenset((*record["states"], *record["blocks"], self._progress.name, self._adopted.name))

    def _drop(self, file: Path) -> None:
        if file.name not in self._counted:
            with storing(file):
                file.unlink(missing_ok=True)

    def _whole(self, record: Progress) -> bool:
        try:
            for file in (*record["states"], *record["blocks"]):
                read_header(self.folder / file)
        except CheckpointError:
            return False
        return True

    def _state(self, name: str, step: int) -> Path:
        return self.folder / f"state.{name}.{step}.safetensors"

    def _block(self, index: int, step: int) -> Path:
        return self.folder / f"block.{index:05d}.{step}.safetensors"


def _read(path: Path) -> Progress | None:
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # absent, or cut short by a power cut, which is as good as absent
        return None
    return document if isinstance(document, dict) else None
