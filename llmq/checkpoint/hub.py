"""Locate the folder of a model, and download it from the Hugging Face Hub if necessary.

A local folder is used directly. Anything else that looks like a Hub id (`name` or `owner/name`) is passed to
huggingface_hub, with its cache, its token, HF_HUB_OFFLINE and its progress bars. Only files that llmq reads or copies
are downloaded, and Python files only if the user allows to run the code of the model.
"""

from pathlib import Path

from llmq.checkpoint.index import locate_tensors
from llmq.checkpoint.model_id import require_id
from llmq.checkpoint.model_path import require_model
from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError, ConfigError

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*.md")
CONFIGURATION = ("*.json", "*.jinja")
REMOTE_CODE = ("*.py",)
# Some repositories hold a second copy of the weights in another layout.
UNWANTED = ("*/*.safetensors", "consolidated*.safetensors")


def locate(model: str, revision: str | None = None, *, remote_code: bool = False, weights: bool = True) -> Path:
    """Return the folder of a model; download the model if necessary.

    model        a path or a Hub id
    revision     branch, tag or commit on the Hub; None is the default branch
    remote_code  also download the Python files of the model
    weights      whether more than its configuration is needed

    Raises CheckpointError if the model does not exist, is something else (`model_path.py`), is gated, or is not cached
    and the Hub cannot be reached; ConfigError for a revision of a local folder.
    """
    with reading(Path(model)):
        local = bool(model) and Path(model).exists()  # Path("") is the current folder
    if local:
        if revision is not None:
            message = f"{model} is a local folder, so --revision {revision!r} does not apply"
            raise ConfigError(message, hint="omit --revision, or give a Hub id")
        require_model(Path(model))
        return Path(model)
    require_id(model)
    return _download(model, revision, [*(WANTED if weights else CONFIGURATION), *(REMOTE_CODE if remote_code else ())])


def stored_bytes(model: str, revision: str | None = None) -> int | None:
    """Bytes of all tensors of a model, from the headers of its safetensors files; None if it has none of them.

    Of a model on the Hub only the headers are read, by range requests; None without a connection.
    """
    if Path(model).exists():
        has_weights = any(Path(model).glob("*.safetensors"))
        return sum(location.info.nbytes for location in locate_tensors(Path(model)).values()) if has_weights else None
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = HfApi().get_safetensors_metadata(model, revision=revision).files_metadata.values()
        tensors = [tensor for file in files for tensor in file.tensors.values()]
        nbytes: int = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors)
        return nbytes
    except NotASafetensorsRepoError:
        return None
    except (SafetensorsParsingError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the weights of {model} have an invalid header: {error}") from error
    except _failures() as error:
        raise _explained(model, revision, error) from error


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # imported here because it is slow, and local folders do not need it

    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=list(UNWANTED)
        )
    except _failures() as error:
        raise _explained(model, revision, error) from error
    return Path(folder)


def _failures() -> tuple[type[Exception], ...]:
    """The errors of huggingface_hub.

    The HTTP library of huggingface_hub depends on its version, but the base class of its errors is always a base of
    HfHubHTTPError. The transfer library, written in Rust, raises RuntimeError.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, RuntimeError, HFValidationError, *HfHubHTTPError.__bases__)


def _explained(model: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the licence on https://huggingface.co/{model}, then log in with: hf auth login"
        return CheckpointError(f"{model} is gated: its owner has to grant access", hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"{model} has no revision {revision!r} on the Hub"
        return CheckpointError(message, hint=f"see https://huggingface.co/{model}/tree/main for its revisions")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        message = f"{model!r} is neither a local folder nor a model on the Hub"
        return CheckpointError(message, hint="check the spelling; for a private model log in with: hf auth login")
    if constants.HF_HUB_OFFLINE:
        message = f"{model} is neither a local folder nor completely cached, and HF_HUB_OFFLINE is set"
        return CheckpointError(message, hint="check the path, or unset HF_HUB_OFFLINE to download it")
    hint = "check the path, the network and the disk space, then repeat the command: downloaded files are kept"
    return CheckpointError(f"{model} is not a local folder, and cannot be downloaded: {error}", hint=hint)
