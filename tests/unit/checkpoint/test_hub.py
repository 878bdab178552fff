"""Names of models that a user may give, without a network."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from llmq.checkpoint.hub import locate
from llmq.errors import CheckpointError, ConfigError


class Response:
    """The parts of an HTTP response that the errors of huggingface_hub need."""

    headers: dict[str, str] = {}
    request = None
    status_code = 403


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def failing(error: Exception) -> Any:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    return snapshot_download


def test_folder_is_returned_unchanged(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_folder_takes_precedence_over_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")


def test_folder_refuses_a_revision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--revision 'main' does not apply"):
        locate(str(tmp_path), "main")


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "./nothing", "../nothing", "a/b/c", "", "a b", "x" * 5000, "-x", "~/x"]
)
def test_invalid_id_does_not_contact_the_hub(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(AssertionError("the Hub was contacted")))
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    assert caught.value.hint


def test_cached_model_is_found_offline(cache: Path) -> None:
    repository, commit = cache / "models--owner--name", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert locate("owner/name").resolve() == snapshot.resolve()


def test_offline_without_cache_raises_error(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        locate("owner/name")
    assert "unset HF_HUB_OFFLINE" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (errors.GatedRepoError("403", response=Response()), "is gated", "hf auth login"),
        (errors.RepositoryNotFoundError("404", response=Response()), "neither a local folder nor a model", "spelling"),
        (errors.RevisionNotFoundError("404", response=Response()), "no revision 'v2'", "huggingface.co/owner/name"),
        (errors.HFValidationError("two dots"), "neither a local folder nor a model", "spelling"),
        (errors.HfHubHTTPError("500", response=Response()), "cannot be downloaded", "network"),
        (errors.LocalEntryNotFoundError("no connection"), "cannot be downloaded", "network"),
        (errors.HfHubHTTPError.__bases__[0]("reset by peer"), "cannot be downloaded", "network"),
        (RuntimeError("transfer failed"), "cannot be downloaded", "network"),
        (OSError(28, "No space left on device"), "No space left", "space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_error_becomes_message_and_hint(
    error: Exception, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
    with pytest.raises(CheckpointError, match=message) as caught:
        locate("owner/name", "v2")
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("remote_code", [False, True])
def test_code_is_downloaded_on_request_and_pickles_never(
    remote_code: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request: dict[str, Any] = {}

    def snapshot_download(model: str, **options: Any) -> str:
        request.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("owner/name", "v2", remote_code=remote_code) == tmp_path
    assert (request["model"], request["revision"]) == ("owner/name", "v2")
    in_repository = [
        "model.safetensors", "config.json", "vocab.txt", "tokenizer.model", "chat_template.jinja", "LICENSE",
        "README.md", "modeling_x.py", "pytorch_model.bin", "original/model.safetensors",
    ]  # fmt: skip
    fetched = list(
        huggingface_hub.utils.filter_repo_objects(
            in_repository, allow_patterns=request["allow_patterns"], ignore_patterns=request["ignore_patterns"]
        )
    )
    assert fetched == [*in_repository[:7], *(["modeling_x.py"] if remote_code else [])]
