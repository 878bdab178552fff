"""`Writer`: the output folder of a run, which no crash, kill or full disk costs a finished block.

    open ──► commit block 0 ──► commit block 1 ──► … ──► finishing
      ▲                                                    │ put the model together inside the staging folder,
      └── killed at any point: the same command            │ move it out, config.json last, drop the staging
          continues after the last committed block         ▼

A folder without config.json does not look like a model to any engine, so one that is half moved is never loaded.
The finished model is put together by copying bytes from file to file: memory does not depend on its size.  Until the
staging goes, the blocks are on the disk twice.

A block is written in a thread while the next one is computed.  It is on the disk before the next one is written, and
before anything else is read or written here, so the order of commits is the order of blocks.

One process per output folder: two at once are not kept apart.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from llmq import memory
from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import replacing, storing, sync_folder, write_text
from llmq.checkpoint.index import INDEX
from llmq.checkpoint.safetensors_files import Part, StoredTensors, copy_bytes, reading
from llmq.checkpoint.shards import SHARD_BYTES, write_shards
from llmq.checkpoint.staging import STAGING, Staging, read_or_empty
from llmq.checkpoint.tuned_version import Revision
from llmq.errors import ConfigError, StorageError

CONFIG = "config.json"


class Writer:
    """Blocks go in one by one; a model comes out.  Made by `Writer.open`.

    folder           the output folder
    resumed_blocks   how many blocks an earlier run had committed
    damaged_blocks   blocks of that run whose files do not read back; they are not committed any more
    discarded        whether the staging of a run with another identity was thrown away
    """

    def __init__(self, staging: Staging, *, overwrite: bool, damaged_blocks: Sequence[int], discarded: bool) -> None:
        self.folder = staging.out
        self.damaged_blocks = tuple(damaged_blocks)
        self.discarded = discarded
        self._staging = staging
        self._overwrite = overwrite
        self._committed = set(staging.blocks())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmq-write")
        self._pending: tuple[int, Future[None]] | None = None  # the block that is being written
        self.resumed_blocks = len(self._committed)

    @classmethod
    def open(cls, out: Path, *, identity: Mapping[str, Any], overwrite: bool, needed_bytes: int) -> "Writer":
        """Take possession of an output folder, or continue the run that has it.

        identity      what makes two runs the same: plain values that JSON can hold
        overwrite     replace the model that is in `out`, when the new one is finished
        needed_bytes  what the run will have on the disk at its fullest: the finished model and its blocks

        Raises ConfigError if `out` is a file, or holds anything but the staging of the same run (finished blocks of
        another one are not thrown away unasked) and `overwrite` is not set; StorageError if there is too little space,
        or `out` cannot be written.
        """
        with storing(out):
            if out.exists() and not out.is_dir():
                raise ConfigError(f"{out} is a file, expected a folder", hint="give another output folder")
            staging = Staging(out)
            resumable = staging.belongs_to(identity)
            if not overwrite:
                _refuse_other_files(staging, resumable=resumable)
            _require_space(out, needed_bytes, present=staging.nbytes())
            discarded = staging.exists() and not resumable
            if discarded and staging.blocks() and not overwrite:
                raise ConfigError(
                    f"{out} holds {len(list(staging.blocks()))} finished blocks of a run with other settings",
                    hint="give the settings of that run to continue it, another folder, or --overwrite to discard them",
                )
            created = not out.exists() or (discarded and staging.created_out)
            if discarded:
                staging.remove()
            if not resumable:
                out.mkdir(parents=True, exist_ok=True)
                staging.begin(identity, created_out=created)
            staging.sweep()
            damaged = staging.drop_damaged()
            return cls(staging, overwrite=overwrite, damaged_blocks=damaged, discarded=discarded)

    @staticmethod
    def require_free(out: Path) -> None:
        """Raise ConfigError if `open` without `overwrite` would refuse `out` whatever the run."""
        with storing(out):
            if out.exists() and not out.is_dir():
                raise ConfigError(f"{out} is a file, expected a folder", hint="give another output folder")
            _refuse_other_files(Staging(out), resumable=True)

    @property
    def revision(self) -> Revision:
        """Where a second version of the committed blocks is made; `assemble` takes it where it was adopted."""
        self.settle()
        return self._staging.revision

    @property
    def activations(self) -> Path:
        """A folder for hidden states that do not fit into memory; may not exist, and is emptied between runs."""
        return self._staging.activations

    def has(self, index: int) -> bool:
        """Whether a block is committed."""
        return index in self._committed

    def commit(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Begin to put a block on the disk for good: its tensors under their final names, and a record that JSON can
        hold.

        The tensors must not change any more.  Raises StorageError if this block, or the one before it, cannot be
        written; the blocks before that stand.
        """
        self.settle()
        self._committed.discard(index)
        if memory.spare(memory.HOST) < memory.AMPLE_BYTES:
            self._write(index, tensors, record)
        else:
            self._pending = index, self._thread.submit(self._write, index, tensors, record)
        self._committed.add(index)

    def settle(self) -> None:
        """Wait until every committed block is on the disk.  Raises StorageError if the last one could not be
        written.
        """
        if self._pending is not None:
            index, writing = self._pending
            self._pending = None
            self._committed.discard(index)
            writing.result()
            self._committed.add(index)

    def _write(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        with storing(self._staging.folder):
            self._staging.commit(index, tensors, record)

    def read(self, index: int) -> tuple[StoredTensors, dict[str, Any]]:
        """A committed block, each tensor read when it is asked for, and its record.  Raises CheckpointError."""
        self.settle()
        return self._staging.read(index)

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """An empty folder for the finished model, or for folders with one each.

        All that lies in it at the end becomes the output, every config.json last, and the staging goes.  With
        `overwrite`, old safetensors files, their index, .gguf files of llmq's, and files of the same names go before
        the new ones come; nothing else is touched.  Raises StorageError if something cannot be written and
        CheckpointError if something cannot be read, the blocks being kept; ConfigError if something that may not go has
        the name of a new file.
        """
        self.settle()
        staging = self._staging
        with storing(self.folder):
            staging.sweep()  # an earlier attempt of this very writer may have failed half way
            staging.final.mkdir()
            yield staging.final
            names = sorted(path.relative_to(staging.final).as_posix() for path in _files(staging.final))
            names.sort(key=lambda name: PurePosixPath(name).name == CONFIG)  # half a model is no model
            _refuse_collisions(self.folder, names, overwrite=self._overwrite)
            if self._overwrite:
                _remove_old_models(self.folder, names)
            staging.announce(names)
            for name in names:
                target = self.folder / name
                target.parent.mkdir(exist_ok=True)
                (staging.final / name).rename(target)
                sync_folder(target.parent)
            sync_folder(self.folder)  # the names of new folders in it, before what they were made of goes
            staging.remove()
            sync_folder(self.folder)

    def assemble(
        self,
        folder: Path,
        rest: Sequence[Part],
        files: Sequence[Path],
        documents: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Put a model together in `folder`, out of the committed blocks.

        rest         tensors to copy from other files, after the blocks
        files        files to copy byte for byte
        documents    name -> text of files to write, config.json among them
        shard_bytes  the most that a shard may hold
        """
        written = write_shards(folder, self.parts(rest), shard_bytes)
        names = [*(file.name for file in files), *documents, *written]
        if len(set(names)) < len(names):
            raise ValueError(f"two files of one name: {sorted(names)}")
        put_companions(folder, files, documents)

    def scratch(self) -> Path:
        """An empty folder for a model that another one is made from; it goes with the staging."""
        self._staging.scratch.mkdir()
        return self._staging.scratch

    def parts(self, rest: Sequence[Part] = ()) -> list[Part]:
        """Where every tensor of the finished model lies: those of the committed blocks, and `rest`."""
        self.settle()
        return [*self._staging.parts(sorted(self._committed)), *rest]

    def abandon(self) -> bool:
        """Leave without a model.  Returns whether there is anything to continue; if not, nothing is left behind."""
        if self._pending is not None:
            index, writing = self._pending
            wait([writing])
            if writing.exception() is not None:  # an earlier error ended the run, and is reported
                self._committed.discard(index)
            self._pending = None
        if self._committed:
            return True
        with storing(self.folder):
            created = self._staging.created_out
            if self._staging.exists():  # it does not after `finishing`
                self._staging.sweep()
                self._staging.remove()
            if created and not any(self.folder.iterdir()):
                self.folder.rmdir()
        return False


def _refuse_other_files(staging: Staging, *, resumable: bool) -> None:
    if not staging.out.exists():
        return
    moved = staging.moved() if resumable else []
    ours = {STAGING, *(PurePosixPath(name).parts[0] for name in moved)}
    others = sorted(entry.name for entry in staging.out.iterdir() if entry.name not in ours)
    if others:
        message = f"{staging.out} is not empty: it holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"
        unfinished = "; finished blocks in it are continued" if resumable and staging.exists() else ""
        raise ConfigError(message, hint=f"give another folder, or --overwrite to replace the model in it{unfinished}")


def _require_space(out: Path, needed_bytes: int, *, present: int) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = needed_bytes * 21 // 20 - present  # 5 % for reports, file systems and others who write
    if free < needed:
        message = f"the disk of {out} has {free / 1e9:.3f} GB free, and the run needs {needed / 1e9:.3f} GB"
        raise StorageError(message, hint="free some space, or give an output folder on another disk")


def put_companions(folder: Path, files: Sequence[Path], documents: Mapping[str, str]) -> None:
    """Copy files byte for byte into a folder, and write documents (name -> text) beside them."""
    for file in files:
        _copy(file, folder / file.name)
    for name, text in documents.items():
        write_text(folder / name, text)


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        size = source.stat().st_size
    with replacing(target) as file:
        copy_bytes(source, 0, size, file)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _remove_old_models(folder: Path, names: Sequence[str]) -> None:
    """Make room for `names`, a model in `folder` or one in each of some folders in it."""
    new: dict[Path, list[str]] = {folder: []}
    for path in map(PurePosixPath, names):
        new.setdefault(folder / path.parent, []).append(path.name)
    for place, own in new.items():
        old = {entry.name for entry in place.glob("*.safetensors")} | _own_gguf(place, folder)
        if own or old or (place / INDEX).exists():
            _remove(place, {*old, *own, INDEX, CONFIG})
            _remove(place, {PROVENANCE_FILE})  # the last to go: it says which files are llmq's


def _own_gguf(place: Path, out: Path) -> set[str]:
    """The .gguf files that an earlier run wrote: where it left its record, by their name or as listed there."""
    if not (place / PROVENANCE_FILE).is_file():
        return set()
    recorded = read_or_empty(place / PROVENANCE_FILE).get("checksums")
    ours = {f"{out.resolve().name}.gguf", *(recorded if isinstance(recorded, dict) else ())}
    return {entry.name for entry in place.glob("*.gguf")} & ours


def _remove(folder: Path, names: Collection[str]) -> None:
    for name in sorted(names, key=lambda name: name != CONFIG):  # config.json first: from here on there is no model
        if (folder / name).exists() and not (folder / name).is_dir():
            (folder / name).unlink()
            sync_folder(folder)


def _refuse_collisions(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    places = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."}
    for name in sorted(places):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ConfigError(f"{folder / name} is a file, and a folder is to be made there", hint="move it away")
    for name in names:
        if (folder / name).is_dir() or ((folder / name).exists() and not overwrite):
            message = f"{folder / name} is in the way of a file to be written"
            raise ConfigError(message, hint="move it away and give the same command again: finished blocks are kept")
