"""Upload a finished model to the Hub, in one commit, so that a repository never holds half a model.

Only files of the model are uploaded: those that llmq.json lists, their card, licence and report. Other files of the
folder stay where they are.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import PROVENANCE_FILE
from llmq.checkpoint.confined import confined
from llmq.checkpoint.safetensors_files import reading
from llmq.checkpoint.side_files import CARD, ORIGINAL_CARD, leaves
from llmq.checkpoint.staging import STAGING
from llmq.errors import CheckpointError, ConfigError, StorageError
from llmq.export import card
from llmq.export.conversion import WEIGHTS
from llmq.report.stored_record import read_record

TEXTS = re.compile(
    rf"{re.escape(CARD)}|{re.escape(ORIGINAL_CARD)}|(licen[cs]e|notice|copying)(\..*)?|report\.(html|json)|layers\.csv",
    re.IGNORECASE,
)
LOG_IN = "log in with a token that may write: hf auth login"
PATHS = "llmq.json holds paths of this machine ({}), and everybody who may read the repository sees them"


@dataclass(frozen=True)
class Parcel:
    """The files of a model: name in the repository -> file; names in the folder that are left out; notes."""

    files: dict[str, Path]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes."""
        return {name: file.stat().st_size for name, file in self.files.items()}


def parcel(folder: Path) -> Parcel:
    """The files of the finished model in `folder`; raises CheckpointError if llmq did not finish it there."""
    with reading(folder):
        entries = sorted(entry.name for entry in folder.iterdir())
    if STAGING in entries:
        raise CheckpointError(
            f"{folder} holds an unfinished run of llmq, expected a finished model",
            hint="repeat the command that started the run: it continues",
        )
    record = read_record(folder)
    if not record.get("checksums"):
        raise CheckpointError(
            f"{folder} has no {PROVENANCE_FILE} with the checksums of its files, so it is not a result of llmq",
            hint="upload other models with: hf upload",
        )
    names = {PROVENANCE_FILE, *record["checksums"], *(name for name in entries if TEXTS.fullmatch(name))}
    files = {name: _own(folder, name) for name in sorted(names)}
    left_out = tuple(name for name in entries if not any(own.split("/")[0] == name for own in files))
    paths = [str(record[key]) for key in ("source", "output") if Path(str(record.get(key, ""))).is_absolute()]
    return Parcel(files, left_out, (PATHS.format(", ".join(paths)),) if paths else ())


def _own(folder: Path, name: str) -> Path:
    """The file with a name; raises CheckpointError if it is not in the folder."""
    file = confined(folder, name)
    if file is None or not file.is_file() or leaves(folder, file):
        raise CheckpointError(
            f"{name} is not a file in {folder}, expected one", hint="restore the file, or quantize the model again"
        )
    return file


def push(parcel: Parcel, repository: str, *, public: bool = False) -> str:
    """Upload the files, and return the address of the repository, which is created if necessary.

    Raises ConfigError for a repository that must not get the files, and StorageError if the Hub refuses them.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _explained(repository):
        _require_place(api, parcel, repository, public=public)
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        operations = [
            CommitOperationAdd(name, card.named(file.read_text(encoding="utf-8"), repository).encode())
            if name == CARD
            else CommitOperationAdd(name, file)
            for name, file in parcel.files.items()
        ]
        api.create_commit(repository, operations, commit_message="Upload a model quantized with llmq")
    return address


def require_name(repository: str) -> None:
    """Raise ConfigError if no repository of the Hub can have this name."""
    from huggingface_hub.utils import validate_repo_id

    with _explained(repository):
        validate_repo_id(repository)


def _require_place(api: Any, parcel: Parcel, repository: str, *, public: bool) -> None:
    """Raise ConfigError if the repository is public, or has weights that the new model would not replace."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return  # it will be created, or that fails with its own reason
    if not info.private and not public:
        raise ConfigError(
            f"{repository} is public", hint="add --public to publish the model, or name another repository"
        )
    present = [item.rfilename for item in info.siblings or () if item.rfilename.endswith((*WEIGHTS, ".index.json"))]
    others = sorted(set(present) - set(parcel.files))
    if others:
        raise ConfigError(
            f"{repository} holds other weights, which would stay next to the new ones: {', '.join(others[:3])}",
            hint="name another repository, or delete these files on the Hub first",
        )


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into those of llmq."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(f"{repository!r} is not a valid name: {error}", hint="for example owner/name") from error
    except errors.LocalTokenNotFoundError as error:
        raise StorageError("uploading needs a token of the Hub", hint=LOG_IN) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise StorageError(f"the Hub does not let you write to {repository} ({status})", hint=LOG_IN) from error
        raise StorageError(f"cannot upload to {repository}: {error}", hint="repeat the command") from error
    except (OSError, RuntimeError, *errors.HfHubHTTPError.__bases__) as error:
        if constants.HF_HUB_OFFLINE:
            raise StorageError("HF_HUB_OFFLINE is set, so nothing is uploaded", hint="unset it") from error
        hint = "check the network, then repeat the command: uploaded files are kept"
        raise StorageError(f"cannot upload to {repository}: {error.__cause__ or error}", hint=hint) from error
