"""Reading checkpoint folders, and the errors for folders that are not a checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.index import gguf_file
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.safetensors_files import TensorInfo
from llmq.checkpoint.staging import STAGING
from llmq.errors import CheckpointError

TENSORS = {
    "model.embed.weight": torch.arange(6.0).reshape(3, 2),
    "model.layers.0.proj.qweight": torch.arange(4, dtype=torch.int32),
    "model.layers.0.proj.scales": torch.ones(2, dtype=torch.float16),
    "model.layers.1.proj.qweight": torch.arange(4, dtype=torch.int32) + 4,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def model(folder: Path, files: Mapping[str, Mapping[str, Tensor]], index: object = None) -> Path:
    """A model folder with these safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def split(count: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    items = list(TENSORS.items())
    return dict(items[:count]), dict(items[count:])


def sharded(folder: Path, **changes: str) -> Path:
    """A model in two shards; `changes` replaces the file of a tensor in the index."""
    one, two = split()
    weight_map = {**dict.fromkeys(one, SHARDS[0]), **dict.fromkeys(two, SHARDS[1]), **changes}
    return model(folder, dict(zip(SHARDS, (one, two), strict=True)), {"weight_map": weight_map})


def holds_everything(checkpoint: Checkpoint) -> bool:
    return set(checkpoint.names()) == set(TENSORS) and all(checkpoint.tensor(n).equal(t) for n, t in TENSORS.items())


def test_single_file_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model(tmp_path, {"model.safetensors": TENSORS}))
    assert holds_everything(checkpoint)
    assert checkpoint.config == {"model_type": "toy"}
    assert checkpoint.files == (tmp_path / "model.safetensors",)


def test_shards_with_an_index_are_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert holds_everything(checkpoint)
    assert [file.name for file in checkpoint.files] == list(SHARDS)


def test_tensor_missing_from_the_index_is_ignored(tmp_path: Path) -> None:
    folder = model(tmp_path, {"a.safetensors": TENSORS}, {"weight_map": {"model.embed.weight": "a.safetensors"}})
    assert Checkpoint.open(folder).names() == ["model.embed.weight"]


def test_single_file_with_another_name_is_read(tmp_path: Path) -> None:
    assert holds_everything(Checkpoint.open(model(tmp_path, {"weights.safetensors": TENSORS})))


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    assert holds_everything(Checkpoint.open(model(tmp_path, dict(zip(SHARDS, split(), strict=True)))))


def test_properties_are_known_without_reading_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model(tmp_path, {"model.safetensors": TENSORS}))
    info = checkpoint.info("model.embed.weight")
    assert isinstance(info, TensorInfo)
    assert (info.dtype, info.shape, info.nbytes) == (torch.float32, (3, 2), 24)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert "model.embed.weight" in checkpoint
    assert "model.embed.bias" not in checkpoint
    assert sorted(checkpoint.modules_with("qweight")) == ["model.layers.0.proj", "model.layers.1.proj"]
    assert checkpoint.modules_with(".scales") == ["model.layers.0.proj"]
    assert checkpoint.modules_with("weight") == ["model.embed"]  # the whole name, not the end of qweight


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor nothing\.weight"):
        Checkpoint.open(model(tmp_path, {"model.safetensors": TENSORS})).tensor("nothing.weight")


def test_symbolic_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    sharded(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert holds_everything(Checkpoint.open(snapshot))


@pytest.mark.parametrize(
    "path",
    ["/etc/x.safetensors", "../x.safetensors", "sub/../../x.safetensors", r"..\x.safetensors", r"C:\x.safetensors",
     r"\\host\x.safetensors", "x\0.safetensors", "", "config.json", "model.bin"],
)  # fmt: skip
def test_index_that_leaves_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="in the folder"):
        Checkpoint.open(sharded(tmp_path / "model", **{"model.embed.weight": path}))


def test_index_may_name_a_subfolder(tmp_path: Path) -> None:
    folder = model(tmp_path, {}, {"weight_map": dict.fromkeys(TENSORS, "weights/a.safetensors")})
    (folder / "weights").mkdir()
    save_file(TENSORS, folder / "weights" / "a.safetensors")
    assert holds_everything(Checkpoint.open(folder))


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"names {SHARDS[1]}, which is not in the folder"):
        Checkpoint.open(tmp_path)


def test_too_long_shard_name_raises_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint.open(sharded(tmp_path, **{"model.embed.weight": "x" * 5000 + ".safetensors"}))


def test_missing_shard_is_detected_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"not {SHARDS[1]}: 1 of 2 shards are missing"):
        Checkpoint.open(model(tmp_path, {SHARDS[0]: TENSORS}))


def test_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"lists model\.embed\.weight in {SHARDS[1]}, but that file does not"):
        Checkpoint.open(sharded(tmp_path, **{"model.embed.weight": SHARDS[1]}))


def test_duplicate_tensor_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.embed.weight is in"):
        Checkpoint.open(model(tmp_path, {"a.safetensors": TENSORS, "b.safetensors": TENSORS}))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_index_without_a_weight_map_is_refused(text: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="index.json") as caught:
        Checkpoint.open(folder)
    assert caught.value.hint


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pickle"])
def test_pickled_weights_are_refused(suffix: str, tmp_path: Path) -> None:
    (model(tmp_path, {}) / f"pytorch_model{suffix}").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\{suffix}") as caught:
        Checkpoint.open(tmp_path)
    assert "safe_serialization" in caught.value.hint


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint.open(model(tmp_path, {}))


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        Checkpoint.open(tmp_path / "absent")
    assert caught.value.exit_code == 3


def test_hint_for_file_does_not_name_a_folder_without_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint.open(tmp_path / "weights.bin")
    assert str(tmp_path) not in caught.value.hint


@pytest.mark.parametrize("name", ["", "model.gguf"])
@pytest.mark.parametrize("configured", [True, False])
def test_gguf_file_is_refused_with_other_commands(tmp_path: Path, name: str, configured: bool) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    if configured:
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.gguf is a \.gguf file") as caught:
        Checkpoint.open(tmp_path / name)
    assert all(word in caught.value.hint for word in ("llama.cpp", "llmq eval", "llmq convert"))


def test_safetensors_take_precedence_over_gguf(tmp_path: Path) -> None:
    folder = model(tmp_path, {"model.safetensors": TENSORS})
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert gguf_file(folder) is None
    assert gguf_file(folder / "model.gguf") == folder / "model.gguf"


def test_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path, {"model.safetensors": TENSORS})
    with pytest.raises(CheckpointError, match="is a file") as caught:
        Checkpoint.open(folder / "model.safetensors")
    assert str(folder) in caught.value.hint


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)


def test_unfinished_run_is_recognized(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    with pytest.raises(CheckpointError, match="unfinished run"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000])
def test_config_without_object_is_refused(text: str, tmp_path: Path) -> None:
    (model(tmp_path, {"model.safetensors": TENSORS}) / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user without root permissions")
def test_unreadable_folder_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", {"model.safetensors": TENSORS})
    folder.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="cannot read"):
            Checkpoint.open(folder)
    finally:
        folder.chmod(0o700)


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "other"}')


def change_header(folder: Path) -> None:
    renamed = {name.replace("proj", "porj"): tensor for name, tensor in TENSORS.items()}  # the size stays
    time = (folder / "model.safetensors").stat().st_mtime_ns
    save_file(renamed, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(time, time))


def change_time(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def rename_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")


@pytest.mark.parametrize("change", [change_config, change_header, change_time, rename_file])
def test_fingerprint_changes_only_with_the_files(change: object, tmp_path: Path) -> None:
    folder = model(tmp_path, {"model.safetensors": TENSORS})
    before = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == before
    change(folder)  # type: ignore[operator]
    assert Checkpoint.open(folder).fingerprint() != before


@pytest.mark.parametrize("name", ["gptqmodel-gptq-sym-g128", "llmcompressor-ct-w4a16-sym-g128", "base-fp16"])
def test_checkpoints_of_other_tools_equal_the_package(name: str, shared: Path) -> None:
    checkpoint = Checkpoint.open(shared / "golden" / name)
    expected = load_file(shared / "golden" / name / "model.safetensors")
    assert set(checkpoint.names()) == set(expected)
    assert all(checkpoint.tensor(key).equal(tensor) for key, tensor in expected.items())
