"""A model as the user names it -> a folder on this machine.

A folder is taken as it is.  Anything else that reads like an id of the Hugging Face Hub (`name` or `owner/name`) goes
to huggingface_hub, with its cache, its token, HF_HUB_OFFLINE and its progress bars; only the files that llmq reads or
copies are fetched.  Python files are fetched only for those who asked to run a model's own code.
"""

import re
from pathlib import Path

from llmq.checkpoint.safetensors_files import reading
from llmq.errors import CheckpointError, ConfigError

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
REMOTE_CODE = ("*.py",)
# A second copy of the weights in another layout, which some owners keep in the same repository.
UNWANTED = ("*/*.safetensors", "consolidated*.safetensors")

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def locate(model: str, revision: str | None = None, *, remote_code: bool = False) -> Path:
    """The folder of a model, downloaded if need be.

    model        a path, or an id of the Hub
    revision     branch, tag or commit on the Hub; None is the default branch
    remote_code  fetch the model's Python files too

    Raises CheckpointError if there is no such model, it is gated, or it is not cached and the Hub is out of reach;
    ConfigError for a revision of a local folder.
    """
    with reading(Path(model)):
        local = bool(model) and Path(model).exists()  # Path("") is the current folder
    if local:
        if revision is not None:
            message = f"{model} is on this machine, so there is no revision {revision!r} of it"
            raise ConfigError(message, hint="leave --revision away, or give a model of the Hub")
        return Path(model)
    if not _ID.fullmatch(model):
        message = f"{model!r} is neither a path on this machine nor the id of a model on the Hub"
        raise CheckpointError(message, hint="give a folder with a config.json, or an id such as Qwen/Qwen3-0.6B")
    return _download(model, revision, [*WANTED, *(REMOTE_CODE if remote_code else ())])


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # here, because it takes a while and a local folder needs none of it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The HTTP library below differs between versions, but the root of its errors is a base of HfHubHTTPError in each;
    # RuntimeError is how the transfer library, written in Rust, says that it failed.
    failures = (OSError, RuntimeError, HFValidationError, *HfHubHTTPError.__bases__)
    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=list(UNWANTED)
        )
    except failures as error:
        raise _explained(model, revision, error) from error
    return Path(folder)


def _explained(model: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the licence on https://huggingface.co/{model}, then log in with: hf auth login"
        return CheckpointError(f"{model} is gated: its owner wants to know who downloads it", hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        message = f"{model} has no revision {revision!r} on the Hub"
        return CheckpointError(message, hint=f"see https://huggingface.co/{model}/tree/main for what there is")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        message = f"{model!r} is neither a folder on this machine nor a model on the Hub"
        return CheckpointError(message, hint="check the spelling; for a private model log in with: hf auth login")
    if constants.HF_HUB_OFFLINE:
        message = f"{model} is no folder here, and not (completely) in the Hub's cache, and HF_HUB_OFFLINE is set"
        return CheckpointError(message, hint="check the path, or unset HF_HUB_OFFLINE to download it")
    hint = "check the path, the network and the space on the disk, then try again: what is downloaded is kept"
    return CheckpointError(f"cannot download {model}: {error}", hint=hint)
