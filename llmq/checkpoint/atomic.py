"""Files that appear whole or not at all.

A file is written under a passing name beside its final one, pushed to the disk (fsync), and renamed.  Rename within a
folder is atomic in every file system that matters here, so a reader, a crash or a power cut meets the old file or
the new one and never half of one.  The folder is pushed to the disk as well: a rename that is not may be lost.

Whatever the system says meanwhile (no space left, quota, read-only, no permission) becomes one `StorageError`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llmq.errors import StorageError

PARTIAL = ".partial"  # ends the name of a file that is being written

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
    """Every OSError inside becomes a StorageError that names `path`, what the system said, and how to go on."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "put the cause right")
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            hint=f"{remedy} and give the same command again: finished blocks are kept, and it continues after them",
        ) from error


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and leaves nothing behind when it does not.

    One that is not `durable` may be lost, or be cut short, in a power cut, until `sync_file` was called for it.  Raises
    StorageError for what the system refuses.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with storing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:  # Ctrl-C too: a full disk gets its space back
            partial.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Push the contents of a file to the disk; its name is pushed with `sync_folder`."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all.  Raises StorageError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Push the names in a folder to the disk, where the system can."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)
