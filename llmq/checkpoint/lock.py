"""One process at a time writes to an output folder: a lock that the system releases when its owner ends, however.

On a file system without such locks filelock writes the process and its host into the file; the lock of a process that
has ended is taken over. filelock also notices a file that its last owner deletes at the moment when it is locked.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llmq.checkpoint.atomic import storing
from llmq.errors import StorageError

LOCK = ".llmq-lock"


class FolderLock:
    """The lock of a folder, held from the moment this object is made until `release`."""

    def __init__(self, folder: Path) -> None:
        """Create the folder and lock it. Raises StorageError if another process has the lock."""
        self._file = folder / LOCK
        self._lock = FileLock(self._file, thread_local=False)
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise _busy(folder) from None

    def release(self) -> None:
        """Delete the file, and let other processes use the folder; without effect if it was released before."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows does not delete open files; a file that is left does no harm
                self._file.unlink(missing_ok=True)
            self._lock.release()


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A locked, empty folder that is deleted at the end; what a killed process has left in it is deleted first."""
    lock = FolderLock(folder)
    try:
        with storing(folder):
            _empty(folder)
        yield folder
    finally:
        with storing(folder):
            _empty(folder)
            lock.release()
            folder.rmdir()


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _busy(folder: Path) -> StorageError:
    return StorageError(
        f"another process is writing to {folder}", hint="wait until it has ended, or give another output folder"
    )
