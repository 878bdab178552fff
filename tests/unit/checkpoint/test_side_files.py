"""The files that a result gets from the original: those of the model, and none through links that leave."""

from pathlib import Path

import pytest

from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.side_files import companions, refuse_outside
from llmq.errors import CheckpointError

MODEL = ("tokenizer.json", "LICENSE", "notes.txt", "additional_chat_templates/tools.jinja", "encoding/inner/code.py")
OTHERS = (
    "config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "quant_config.json",
    "adapter_config.json", "adapter_model.safetensors", "trainer_state.json", ".hidden", ".cache/state.json",
    "figures/plot.png", "original/params.json", "original/tokenizer.model", "checkpoint-5/trainer_state.json",
    "onnx/model.onnx", "onnx/tokenizer.json", "encoding/.hidden/file.txt",
)  # fmt: skip


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_belongs_to_the_model_is_copied(tmp_path: Path) -> None:
    copied = companions(fill(tmp_path, *MODEL, *OTHERS, "README.md"))
    assert copied.files.keys() == {*MODEL, "README.original.md"}
    assert copied.files["README.original.md"] == tmp_path / "README.md"
    assert len(copied.notes) == 1 and "adapter_config.json is not used" in copied.notes[0]


def test_the_card_of_a_first_original_is_kept(tmp_path: Path) -> None:
    files = companions(fill(tmp_path, "README.md", "README.original.md")).files
    assert files == {"README.original.md": tmp_path / "README.original.md"}


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    secret, model = fill(tmp_path, "secrets/key") / "secrets", fill(tmp_path / "model", "tokenizer.json")
    (model / "notes.txt").symlink_to(secret / "key")
    (model / "templates").symlink_to(secret)
    (model / "more").mkdir()
    (model / "more" / "inner.txt").symlink_to("../../secrets/key")
    (model / "copy.json").symlink_to("tokenizer.json")
    copied = companions(model)
    assert copied.files.keys() == {"tokenizer.json", "copy.json"}
    assert [note.partition(" is a link")[0] for note in copied.notes] == ["notes.txt", "more/inner.txt"]


def test_links_inside_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    repository = fill(tmp_path / "models--x--y", "blobs/1a", "snapshots/main/config.json") / "snapshots" / "main"
    (repository / "LICENSE").symlink_to("../../blobs/1a")
    (repository / "notes.txt").symlink_to(fill(tmp_path, "elsewhere") / "elsewhere")
    assert companions(repository).files.keys() == {"LICENSE"}


def test_a_file_that_is_written_elsewhere_must_not_be_such_a_link(tmp_path: Path) -> None:
    model = fill(tmp_path / "model", "tokenizer.json")
    (model / "chat_template.jinja").symlink_to(fill(tmp_path, "key") / "key")
    refuse_outside(model, ("tokenizer.json", "absent.json"))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a link that leaves the model folder"):
        refuse_outside(model, ("chat_template.jinja",))


@pytest.mark.parametrize("files", [(), ("config.json",)])
def test_a_folder_with_only_an_adapter_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    fill(tmp_path, "adapter_config.json", "adapter_model.safetensors", *files)
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter") as refused:
        Checkpoint.open(tmp_path)
    assert "llmq merge MODEL ADAPTER OUT" in refused.value.hint
