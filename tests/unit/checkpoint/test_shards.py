"""Writing tensors of many files as the shards of one model."""

import json
from pathlib import Path

import pytest
import torch

from llmq.checkpoint.index import locate_tensors
from llmq.checkpoint.safetensors_files import Part, TensorInfo, read_header, write_tensors
from llmq.checkpoint.shards import split, write_shards
from llmq.errors import CheckpointError


def stored(path: Path, sizes: dict[str, int]) -> list[Part]:
    """A file with tensors of the given sizes in bytes."""
    write_tensors(path, {name: torch.full((size,), size, dtype=torch.uint8) for name, size in sizes.items()})
    return [(path, name, info) for name, info in read_header(path).items()]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(30, [[10, 20], [30], [5]]), (29, [[10], [20], [30], [5]]), (99, [[10, 20, 30, 5]]), (1, [[10], [20], [30], [5]])],
)
def test_shards_are_split_before_the_limit(limit: int, expected: list[list[int]]) -> None:
    parts = [(Path(), str(size), TensorInfo(torch.uint8, (size,), 0, size)) for size in (10, 20, 30, 5)]
    assert [[int(name) for _, name, _ in shard] for shard in split(parts, limit)] == expected


def test_model_in_one_shard_has_no_index(tmp_path: Path) -> None:
    parts = stored(tmp_path / "source", {"a": 10, "b": 20})
    (tmp_path / "out").mkdir()
    assert write_shards(tmp_path / "out", parts, 30) == ["model.safetensors"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_larger_model_has_an_index_of_all_tensors(tmp_path: Path) -> None:
    parts = [*stored(tmp_path / "x", {"a": 10, "b": 20}), *stored(tmp_path / "y", {"c": 30})]
    (tmp_path / "out").mkdir()
    names = write_shards(tmp_path / "out", parts, 30)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert names == [one, two, "model.safetensors.index.json"]
    assert json.loads((tmp_path / "out" / names[2]).read_text()) == {
        "metadata": {"total_size": 60},
        "weight_map": {"a": one, "b": one, "c": two},
    }
    assert {name: (where.file.name, where.info.nbytes) for name, where in locate_tensors(tmp_path / "out").items()} == {
        "a": (one, 10),
        "b": (one, 20),
        "c": (two, 30),
    }


def test_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    parts = [*stored(tmp_path / "x", {"a": 10}), *stored(tmp_path / "y", {"a": 10})]
    with pytest.raises(CheckpointError, match="tensor a occurs twice"):
        write_shards(tmp_path, parts, 10)
