"""`Writer`: the output folder of a run. A crash, a kill or a full disk never costs a finished block.

    open ──► commit block 0 ──► commit block 1 ──► … ──► finishing
      ▲                                                    │ assemble the model inside the staging folder,
      └── killed at any point: the same command            │ move it out, config.json last, delete the staging
          continues after the last committed block         ▼

Engines do not recognize a folder without config.json as a model, so a half-moved model is never loaded. The model is
assembled by copying bytes from file to file: memory does not depend on its size. Until the staging folder is deleted,
the blocks are on disk twice.

An interrupted run is continued only by an equal one: the same source, settings, text, stages, kind of device, and
versions of llmq and torch (`Job._open_writer`). Any other is refused, and discarded with `--overwrite`, because the
bytes would differ.

A block is written in a thread while the next block is computed. The write is finished before the next block is written,
and before any other read or write, so blocks are committed in order.

Only one process may write to an output folder at a time. `Writer.open` locks it until the run is finished or abandoned.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from llmq import memory
from llmq.checkpoint.atomic import replacing, storing, sync_folder, write_text
from llmq.checkpoint.lock import LOCK, FolderLock
from llmq.checkpoint.output_folder import CONFIG as CONFIG
from llmq.checkpoint.output_folder import (
    refuse_collisions,
    refuse_other_files,
    refuse_other_run,
    remove_old_models,
    require_folder,
    require_space,
)
from llmq.checkpoint.recorded_tensors import StoredTensors
from llmq.checkpoint.safetensors_files import Part, copy_bytes, reading
from llmq.checkpoint.shards import SHARD_BYTES, write_shards
from llmq.checkpoint.staging import REMOVED, Staging
from llmq.checkpoint.tuned_version import Revision


class Writer:
    """Collects the quantized blocks and writes the model. Created by `Writer.open`.

    folder           the output folder
    resumed_blocks   the number of blocks that an earlier run committed
    damaged_blocks   blocks of that run that have changed on the disk; they are no longer committed
    discarded        whether the staging folder of a run with another identity was deleted
    """

    def __init__(
        self, staging: Staging, lock: FolderLock, *, overwrite: bool, damaged_blocks: Sequence[int], discarded: bool
    ) -> None:
        self._lock = lock
        self.folder = staging.out
        self.damaged_blocks = tuple(damaged_blocks)
        self.discarded = discarded
        self._staging = staging
        self._overwrite = overwrite
        self._committed = set(staging.blocks())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmq-write")
        self._pending: tuple[int, Future[None]] | None = None  # the block in the thread
        self.resumed_blocks = len(self._committed)

    @classmethod
    def open(cls, out: Path, *, identity: Mapping[str, Any], overwrite: bool, needed_bytes: int) -> "Writer":
        """Start a run in an output folder, or continue the unfinished run in it.

        identity      two runs with the same identity are the same; plain values that JSON can hold
        overwrite     replace the model in `out` when the new one is finished
        needed_bytes  the most that the run has on disk: the finished model and its blocks

        Raises ConfigError if `out` is a file, or if it holds anything but the staging folder of the same run and
        `overwrite` is not set; StorageError if there is too little space, `out` cannot be written, or another process
        writes to it.
        """
        with storing(out):
            require_folder(out)
            is_new = not out.exists()
            require_space(out, needed_bytes, present=Staging(out).nbytes())
        lock = FolderLock(out)
        try:
            return cls._open(Staging(out), lock, identity, overwrite=overwrite, is_new=is_new)
        except BaseException:
            lock.release()
            if is_new and not any(out.iterdir()):
                out.rmdir()
            raise

    @classmethod
    def _open(
        cls, staging: Staging, lock: FolderLock, identity: Mapping[str, Any], *, overwrite: bool, is_new: bool
    ) -> "Writer":
        out = staging.out
        with storing(out):
            staging.clean()
            resumable = staging.belongs_to(identity)
            if not overwrite:
                refuse_other_files(staging, resumable=resumable)
            discarded = staging.exists() and not resumable
            if discarded and not overwrite:
                refuse_other_run(staging)
            created = is_new or (discarded and staging.created_out)
            if discarded:
                staging.remove()
            if not resumable:
                staging.begin(identity, created_out=created)
            staging.sweep()
            damaged = staging.drop_damaged()
            return cls(staging, lock, overwrite=overwrite, damaged_blocks=damaged, discarded=discarded)

    @staticmethod
    def require_free(out: Path) -> None:
        """Raise ConfigError if `open` without `overwrite` would refuse `out` for every run."""
        with storing(out):
            require_folder(out)
            refuse_other_files(Staging(out), resumable=True)

    @staticmethod
    def clean(out: Path) -> None:
        """Delete what a killed process has left next to the finished model in `out`.

        The staging folder is deleted if its run had begun to move files: that run has written the model.
        """
        staging = Staging(out)
        if staging.moved() or any((out / name).exists() for name in (REMOVED, LOCK)):
            lock = FolderLock(out)
            with storing(out):
                staging.clean()
                if staging.moved():
                    staging.remove()
            lock.release()

    def notes(self, total: int) -> list[str]:
        """What a user should know about the earlier run that this one continues or replaces; `total` blocks."""
        notes = []
        if self.resumed_blocks:
            notes.append(f"continued: {self.resumed_blocks} of {total} blocks were finished earlier")
        if self.damaged_blocks:
            damaged = ", ".join(map(str, self.damaged_blocks))
            notes.append(f"blocks {damaged} of an earlier run were damaged on the disk and are computed again")
        if self.discarded:
            notes.append("an unfinished run with other settings was in the output folder; it was discarded")
        return notes

    @property
    def revision(self) -> Revision:
        """The tuned version of the committed blocks; `assemble` uses it if it was adopted."""
        self.settle()
        return self._staging.revision

    @property
    def activations(self) -> Path:
        """A folder for hidden states that do not fit into memory; it may not exist, and is emptied between runs."""
        return self._staging.activations

    @property
    def training(self) -> Path:
        """A folder for the start and the checkpoints of a training; it may not exist, and is kept between runs."""
        return self._staging.training

    @property
    def report_page(self) -> Path:
        """Where the report of the unfinished run is written, for people."""
        return self._staging.report_page

    @property
    def committed(self) -> list[int]:
        """The committed blocks, in order."""
        return sorted(self._committed)

    def has(self, index: int) -> bool:
        """Whether a block is committed."""
        return index in self._committed

    def commit(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Start to write a finished block, which `has` reports from now on: its tensors under their final names, and a
        record that JSON can hold.

        The tensors must not change afterwards. Raises StorageError if this block or the previous block cannot be
        written; earlier blocks are kept.
        """
        self.settle()
        self._committed.discard(index)
        if memory.spare(memory.HOST) < memory.AMPLE_BYTES:
            self._write(index, tensors, record)
            self._committed.add(index)
        else:
            self._committed.add(index)  # until `settle` reports that it could not be written
            self._pending = index, self._thread.submit(self._write, index, tensors, record)

    def settle(self) -> None:
        """Wait until every committed block is on disk. Raises StorageError if the last one could not be written."""
        if self._pending is not None:
            index, writing = self._pending
            wait([writing])  # an interrupt here leaves the block pending, so that `abandon` waits for it
            self._pending = None
            if writing.exception() is not None:
                self._committed.discard(index)
            writing.result()

    def _write(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        with storing(self._staging.folder):
            self._staging.commit(index, tensors, record)

    def read(self, index: int) -> tuple[StoredTensors, dict[str, Any]]:
        """Open a committed block and its record; each access to a tensor reads from disk. Raises CheckpointError."""
        self.settle()
        return self._staging.read(index)

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """An empty folder for the finished model, or for several folders with a model in each.

        At the end its contents are moved to the output folder, every config.json last, and the staging folder is
        deleted. With `overwrite`, old safetensors files, their index, .gguf files written by llmq, and files with the
        names of new files are deleted before; all other files are kept. Raises StorageError if a file cannot be
        written and CheckpointError if a file cannot be read, and keeps the blocks; ConfigError if a file that must be
        kept has the name of a new file.
        """
        self.settle()
        staging = self._staging
        with storing(self.folder):
            staging.sweep()  # an earlier attempt of this writer may have failed
            staging.final.mkdir()
            yield staging.final
            names = sorted(path.relative_to(staging.final).as_posix() for path in _files(staging.final))
            names.sort(key=lambda name: PurePosixPath(name).name == CONFIG)  # without it, not a model
            refuse_collisions(self.folder, names, overwrite=self._overwrite)
            if self._overwrite:
                remove_old_models(self.folder, names)
            staging.announce(names)
            for name in names:
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (staging.final / name).rename(target)
                sync_folder(target.parent)
            sync_folder(self.folder)  # the new folders must be on disk before the staging folder is deleted
            staging.remove()
            sync_folder(self.folder)
            self._lock.release()

    def assemble(
        self,
        folder: Path,
        rest: Sequence[Part],
        files: Mapping[str, Path],
        documents: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Assemble a model in `folder` from the committed blocks.

        rest         tensors to copy from other files, after the blocks
        files        name -> file to copy unchanged
        documents    name -> text of files to write, including config.json
        shard_bytes  the maximum size of a shard
        """
        written = write_shards(folder, self.parts(rest), shard_bytes)
        names = [*files, *documents, *written]
        if len(set(names)) < len(names):
            raise ValueError(f"two files have the same name: {sorted(names)}")
        put_companions(folder, files, documents)

    def scratch(self) -> Path:
        """An empty folder for an intermediate model; it is deleted with the staging folder."""
        self._staging.scratch.mkdir()
        return self._staging.scratch

    def parts(self, rest: Sequence[Part] = ()) -> list[Part]:
        """Where every tensor of the finished model is: those of the committed blocks, and `rest`."""
        self.settle()
        return [*self._staging.parts(sorted(self._committed)), *rest]

    def abandon(self) -> bool:
        """Stop without a model. Returns whether there is a run to continue; if not, all files are deleted."""
        with suppress(Exception):  # an earlier error ended the run, and is reported
            self.settle()
        try:
            if self._committed or self._staging.has_work():
                return True
            with storing(self.folder):
                created = self._staging.created_out
                if self._staging.exists():  # not after `finishing`
                    self._staging.sweep()
                    self._staging.remove()
                self._lock.release()
                if created and not any(self.folder.iterdir()):
                    self.folder.rmdir()
            return False
        finally:
            self._lock.release()


def put_companions(folder: Path, files: Mapping[str, Path], documents: Mapping[str, str]) -> None:
    """Copy files unchanged into a folder, and write documents (name -> text) next to them."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(file, folder / name)
    for name, text in documents.items():
        write_text(folder / name, text)


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        size = source.stat().st_size
    with replacing(target) as file:
        copy_bytes(source, 0, size, file)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
