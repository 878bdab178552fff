"""Write files completely or not at all.

A file is written under a temporary name in the same folder, flushed to disk (fsync) and renamed. A rename within a
folder is atomic, so after a crash or a power cut there is either the old file or the new one, never half a file. The
folder is flushed to disk as well, because otherwise the rename may be lost.

Errors of the operating system (no space left, quota, read-only, no permission) become a `StorageError`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmq.errors import StorageError

PARTIAL = ".partial"  # suffix of a file that is being written

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes (see ulimit -f) or use a file system without one",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "mount the file system writable",
}


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError with the path, the message of the system and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "remove the cause")
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            hint=f"{remedy} and repeat the command: finished blocks are kept",
        ) from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` at the end of the block, or is deleted if an exception is raised.

    If not `durable`, a power cut may lose or truncate the file until `sync_file` is called for it. Raises StorageError
    if the file cannot be written.
    """
    partial = _partial(path)
    with storing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:  # also on Ctrl-C, so that a full disk gets its space back
            partial.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def discard_partial(path: Path) -> None:
    """Delete what a process that was killed while it wrote `path` has left."""
    with storing(path):
        _partial(path).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def sync_file(path: Path) -> None:
    """Flush the contents of a file to disk; `sync_folder` flushes its name."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, completely or not at all. Raises StorageError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Flush the file names of a folder to disk, if the system supports it."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some network file systems
            raise
    finally:
        os.close(descriptor)
