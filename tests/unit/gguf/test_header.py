"""The header of a GGUF file: what it declares is read as by the package gguf, and what cannot be true is refused."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmq.errors import CheckpointError
from llmq.gguf.container import Container
from llmq.gguf.header import Header

FIRST, SECOND = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
ROWS, COLUMNS = 4, 64  # of both tensors, Q4_0
NBYTES = ROWS * COLUMNS // 32 * 18


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.scale", 0.5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 0.25])
    writer.add_bool("llama.yes", True)
    numbers = np.random.default_rng(0)
    for name in (FIRST, SECOND):
        rows = numbers.integers(0, 60, (ROWS, COLUMNS // 32 * 18), dtype=np.uint8)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


def changed(file: Path, at: int, form: str, number: int) -> Path:
    data = bytearray(file.read_bytes())
    struct.pack_into(f"<{form}", data, at, number)
    file.write_bytes(data)
    return file


def after(file: Path, name: str) -> int:
    """Where the number of dimensions of a tensor is."""
    return file.read_bytes().index(name.encode()) + len(name)


def test_keys_and_tensors_are_those_of_the_package(file: Path) -> None:
    ours, theirs = Header(file), gguf.GGUFReader(file)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.value(key) == field.contents(), key
    assert ours.value("nothing") is None
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.kind == tensor.tensor_type.name and info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)


DIMENSIONS, COLUMN, ROW, KIND, OFFSET = 0, 4, 12, 20, 24  # places in the entry of a tensor, after its name


@pytest.mark.parametrize(
    ("name", "place", "form", "number", "words"),
    [
        (FIRST, COLUMN, "Q", 0, "no zeros"),
        (SECOND, ROW, "Q", 0, "no zeros"),
        (FIRST, COLUMN, "Q", 33, "multiples of 32"),
        (SECOND, OFFSET, "Q", 0, "after the previous one"),
        (SECOND, OFFSET, "Q", 96, "after the previous one"),
        (SECOND, OFFSET, "Q", 2**63, "after the previous one"),
        (FIRST, ROW, "Q", 2, "after the previous one"),
        (SECOND, ROW, "Q", 2, "expected"),
        (SECOND, ROW, "Q", 2**62, "expected"),
        (SECOND, DIMENSIONS, "I", 0, "0 dimensions"),
        (SECOND, DIMENSIONS, "I", 2**32 - 1, "dimensions"),
        (FIRST, KIND, "I", 4, "does not know"),
        (FIRST, KIND, "I", 8, "after the previous one"),
    ],
)
def test_tensors_that_cannot_be_there_are_refused(
    name: str, place: int, form: str, number: int, words: str, file: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        Container(changed(file, after(file, name) + place, form, number))


@pytest.mark.parametrize(
    ("place", "form", "number", "words"),
    [
        (0, "I", 0, "does not start with GGUF"),
        (4, "I", 1, "version is 1"),
        (4, "I", 3 << 24, "little-endian"),
        (8, "Q", 1, "with its tensors"),
        (8, "Q", 2**62, "only .* bytes follow"),
        (16, "Q", 2**63, "only .* bytes follow"),
        (24, "Q", 2**63, "a text of"),
    ],
)
def test_counts_that_the_file_cannot_hold_are_refused(
    place: int, form: str, number: int, words: str, file: Path
) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=words):
        Container(changed(file, place, form, number))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data, at: struct.pack_into("<Q", data, at + 8, 2**40), "texts in 'tokenizer.ggml.tokens'"),
        (lambda data, at: struct.pack_into("<I", data, at + 4, 9), "a list of values of type 9"),
        (lambda data, at: struct.pack_into("<I", data, at, 77), "the type 77"),
    ],
    ids=["length", "nested", "type"],
)
def test_lists_that_the_file_cannot_hold_are_refused(
    damage: Callable[[bytearray, int], None], words: str, file: Path
) -> None:
    data = bytearray(file.read_bytes())
    damage(data, data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens"))
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        Header(file)


def test_truncated_and_lengthened_files_are_refused(file: Path) -> None:
    data = file.read_bytes()
    for size in (0, 3, 10, 30, 100, len(data) - NBYTES, len(data) - 40):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="is not a complete GGUF file"):
            Container(file)
    file.write_bytes(data + bytes(64))
    with pytest.raises(CheckpointError, match="with its tensors"):
        Container(file)
