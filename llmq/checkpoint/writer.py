"""`Writer`: the output folder of a run, which no crash, kill or full disk costs a finished block.

    open ──► commit block 0 ──► commit block 1 ──► … ──► finish
      ▲                                                    │ put the model together inside the staging folder,
      └── killed at any point: the same command            │ move it out, config.json last, drop the staging
          continues after the last committed block         ▼

A folder without config.json does not look like a model to any engine, so one that is half moved is never loaded.
The finished model is put together by copying bytes from file to file: memory does not depend on its size.  Until the
staging goes, the blocks are on the disk twice.

One process per output folder: two at once are not kept apart.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.atomic import replacing, storing, sync_folder, write_text
from llmq.checkpoint.revision import Revision
from llmq.checkpoint.shards import SHARD_BYTES, write_shards
from llmq.checkpoint.staging import STAGING, Staging
from llmq.checkpoint.storage import Part, StoredTensors, copy_bytes, reading
from llmq.checkpoint.weights import INDEX
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
        """Where a second version of the committed blocks is made; `finish` takes it where it was adopted."""
        return self._staging.revision

    def has(self, index: int) -> bool:
        """Whether a block is committed."""
        return index in self._committed

    def commit(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put a block on the disk for good: its tensors under their final names, and a record that JSON can hold.

        Raises StorageError if it cannot be written; the blocks before it stand.
        """
        with storing(self._staging.folder):
            self._committed.discard(index)
            self._staging.commit(index, tensors, record)
            self._committed.add(index)

    def read(self, index: int) -> tuple[StoredTensors, dict[str, Any]]:
        """A committed block, each tensor read when it is asked for, and its record.  Raises CheckpointError."""
        return self._staging.read(index)

    def finish(
        self,
        rest: Sequence[Part],
        files: Sequence[Path],
        documents: Mapping[str, str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Turn the committed blocks into the finished model, and drop the staging.

        rest         tensors to copy from other files, after the blocks
        files        files to copy byte for byte
        documents    name -> text of files to write, config.json among them
        shard_bytes  the most that a shard may hold

        With `overwrite`, old safetensors files, their index, and files of the same names go before the new ones come;
        nothing else is touched.  Raises StorageError if something cannot be written and CheckpointError if something
        cannot be read, the blocks being kept; ConfigError if something that may not go has the name of a new file.
        """
        staging = self._staging
        with storing(self.folder):
            staging.sweep()  # an earlier attempt of this very writer may have failed half way
            staging.final.mkdir()
            for file in files:
                _copy(file, staging.final / file.name)
            for name, text in documents.items():
                write_text(staging.final / name, text)
            parts = [*staging.parts(sorted(self._committed)), *rest]
            names = [*(file.name for file in files), *documents, *write_shards(staging.final, parts, shard_bytes)]
            if len(set(names)) < len(names):
                raise ValueError(f"two files of one name: {sorted(names)}")
            names.sort(key=lambda name: name == CONFIG)  # stable: config.json last, so that half a model is no model
            _refuse_collisions(self.folder, names, overwrite=self._overwrite)
            if self._overwrite:
                _remove_old_model(self.folder, names)
            staging.announce(names)
            for name in names:
                (staging.final / name).rename(self.folder / name)
                sync_folder(self.folder)
            staging.remove()
            sync_folder(self.folder)

    def abandon(self) -> bool:
        """Leave without a model.  Returns whether there is anything to continue; if not, nothing is left behind."""
        if self._committed:
            return True
        with storing(self.folder):
            created = self._staging.created_out
            if self._staging.exists():  # it does not after `finish`
                self._staging.sweep()
                self._staging.remove()
            if created and not any(self.folder.iterdir()):
                self.folder.rmdir()
        return False


def _refuse_other_files(staging: Staging, *, resumable: bool) -> None:
    if not staging.out.exists():
        return
    ours = {STAGING, *(staging.moved() if resumable else [])}
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


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        size = source.stat().st_size
    with replacing(target) as file:
        copy_bytes(source, 0, size, file)


def _remove_old_model(folder: Path, names: Sequence[str]) -> None:
    old = {entry.name for entry in folder.glob("*.safetensors")} | {INDEX, *names}
    for name in sorted(old, key=lambda name: name != CONFIG):  # config.json first: from here on there is no model
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
            sync_folder(folder)


def _refuse_collisions(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    for name in names:
        if (folder / name).is_dir() or ((folder / name).exists() and not overwrite):
            message = f"{folder / name} is in the way of a file to be written"
            raise ConfigError(message, hint="move it away and give the same command again: finished blocks are kept")
