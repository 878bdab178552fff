"""What an output folder may hold besides the staging folder: files of llmq, and files of the user, which are kept."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.atomic import sync_folder
from llmq.checkpoint.index import INDEX
from llmq.checkpoint.lock import LOCK
from llmq.checkpoint.staging import REMOVED, STAGING, Staging, read_or_empty
from llmq.errors import ConfigError, StorageError

CONFIG = "config.json"


def require_folder(out: Path) -> None:
    """Raise ConfigError if `out` is a file."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, expected a folder", hint="give another output folder")


def refuse_other_files(staging: Staging, *, resumable: bool) -> None:
    """Raise ConfigError if the output folder holds anything but the staging folder and, if `resumable`, its files."""
    if not staging.out.exists():
        return
    moved = staging.moved() if resumable else []
    ours = {STAGING, REMOVED, LOCK, *(PurePosixPath(name).parts[0] for name in moved)}
    others = sorted(entry.name for entry in staging.out.iterdir() if entry.name not in ours)
    if others:
        message = f"{staging.out} is not empty: it holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"
        unfinished = "; its finished blocks are kept" if resumable and staging.exists() else ""
        raise ConfigError(message, hint=f"give another folder, or --overwrite to replace the model in it{unfinished}")


def refuse_other_run(staging: Staging) -> None:
    """Raise ConfigError if the staging folder, which does not belong to this run, has finished blocks."""
    if blocks := staging.blocks():
        whose = "a run with other settings" if staging.has_identity() else "a run whose identity.json is damaged"
        raise ConfigError(
            f"{staging.out} holds {len(blocks)} finished blocks of {whose}",
            hint="use the settings of that run to continue it, another folder, or --overwrite to discard it",
        )


def require_space(out: Path, needed_bytes: int, *, present: int) -> None:
    """Raise StorageError if the disk has too little space; `present` bytes of the run are there already."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = needed_bytes * 21 // 20 - present  # 5 % reserve for reports, the file system and other processes
    if free < needed:
        message = f"the disk of {out} has {free / 1e9:.3f} GB free, but the run needs {needed / 1e9:.3f} GB"
        raise StorageError(message, hint="free some space, or give an output folder on another disk")


def remove_old_models(folder: Path, names: Sequence[str]) -> None:
    """Delete the old models in `folder` and in its folders that `names` replaces."""
    new: dict[Path, list[str]] = {folder: []}
    for path in map(PurePosixPath, names):
        new.setdefault(folder / path.parent, []).append(path.name)
    for place, own in new.items():
        old = {entry.name for entry in place.glob("*.safetensors")} | _own_gguf(place, folder)
        if own or old or (place / INDEX).exists():
            _remove(place, {*old, *own, INDEX, CONFIG})
            _remove(place, {PROVENANCE_FILE})  # last, because it lists the files that llmq wrote


def _own_gguf(place: Path, out: Path) -> set[str]:
    """The .gguf files that an earlier run wrote: those with the default name or listed in its record."""
    if not (place / PROVENANCE_FILE).is_file():
        return set()
    recorded = read_or_empty(place / PROVENANCE_FILE).get("checksums")
    ours = {f"{out.resolve().name}.gguf", *(recorded if isinstance(recorded, dict) else ())}
    return {entry.name for entry in place.glob("*.gguf")} & ours


def _remove(folder: Path, names: Collection[str]) -> None:
    for name in sorted(names, key=lambda name: name != CONFIG):  # without it, not a model
        if (folder / name).exists() and not (folder / name).is_dir():
            (folder / name).unlink()
            sync_folder(folder)


def refuse_collisions(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise ConfigError if a file or folder that must be kept has the name of a new one."""
    places = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."}
    for name in sorted(places):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ConfigError(f"{folder / name} is a file, expected a folder or nothing", hint="move it away")
    for name in names:
        if (folder / name).is_dir() or ((folder / name).exists() and not overwrite):
            message = f"{folder / name} exists, and a file with this name would be written"
            raise ConfigError(message, hint="move it away and repeat the command: finished blocks are kept")
