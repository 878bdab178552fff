"""Paths that are read from a file stay in its folder, and are ones that a file system can have."""

from pathlib import Path

import pytest

from llmq.checkpoint.confined import LONGEST_NAME, confined


@pytest.mark.parametrize("name", ["model.safetensors", "a/b.json", "a/./b.json", "é" * (LONGEST_NAME // 2), "\ud800"])
def test_names_in_the_folder(name: str, tmp_path: Path) -> None:
    file = confined(tmp_path, name)
    assert file == tmp_path / name and not file.is_file()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../../x", "/x", "C:/x", "\\\\host\\x", "a\0b", "x" * (LONGEST_NAME + 1), "é" * 128,
     "a/" * 2000 + "b", None, 3, ["x"]],
)  # fmt: skip
def test_other_names_are_refused(name: object, tmp_path: Path) -> None:
    assert confined(tmp_path, name) is None
