"""Paths that are read from a file: they must stay in the folder that the file belongs to."""

from pathlib import Path, PurePosixPath, PureWindowsPath

LONGEST_NAME, LONGEST_PATH = 255, 2048  # bytes; a file system refuses longer names, and paths from 4096 on


def confined(folder: Path, name: object) -> Path | None:
    """The path `name` in `folder`; None if it is not the relative path of a file in it.

    Compared as text, because the cache of the Hub stores files as symbolic links into another folder; paths of any
    system are recognized on every system.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts) or not posix.parts:
        return None
    lengths = [len(part.encode("utf-8", "surrogatepass")) for part in (name, *posix.parts)]
    if lengths[0] > LONGEST_PATH or max(lengths[1:]) > LONGEST_NAME:
        return None
    return folder / name
