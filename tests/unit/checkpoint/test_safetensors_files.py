"""Safetensors files read and written by llmq, compared with the safetensors package."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from llmq.checkpoint import safetensors_files
from llmq.checkpoint.atomic import replacing
from llmq.checkpoint.safetensors_files import Part, concatenate, read_header, read_tensor, write_tensors
from llmq.errors import CheckpointError, StorageError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.float4_e2m1fn_x2,
]  # fmt: skip

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8"), max_size=6)
specifications = st.dictionaries(names, st.tuples(st.sampled_from(DTYPES[:-1]), shapes), max_size=6)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes as `dtype`, of shape `shape`."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def tensors_of(specification: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor_of(dtype, shape, seed) for seed, (name, (dtype, shape)) in enumerate(specification.items())}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bytes; bytes, because NaNs differ from themselves."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        and left[name].reshape(-1).view(torch.uint8).equal(right[name].reshape(-1).view(torch.uint8)) for name in left
    )  # fmt: skip


def read_all(path: Path) -> dict[str, Tensor]:
    return {name: read_tensor(path, info) for name, info in read_header(path).items()}


def parts_of(*paths: Path) -> list[Part]:
    return [(path, name, info) for path in paths for name, info in read_header(path).items()]


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: Sequence[Any], first: Any, last: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_compatible_with_the_package(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"x": tensor_of(dtype, (3, 4))}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs)
    write_tensors(ours, tensors)
    assert same(read_all(theirs), tensors)
    assert same(load_file(ours), tensors)


@given(specification=specifications)
@settings(max_examples=40)
def test_any_file_of_the_package_is_read(
    specification: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("read") / "x.safetensors"
    tensors = tensors_of(specification)
    path.write_bytes(save(tensors))
    assert same(read_all(path), tensors)


@given(specification=specifications)
@settings(max_examples=40)
def test_any_tensors_written_are_read_by_the_package(
    specification: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("write") / "x.safetensors"
    tensors = tensors_of(specification)
    write_tensors(path, tensors)
    assert same(load_file(path), tensors)


@given(one=specifications, two=specifications)
@settings(max_examples=40)
def test_any_concatenation_is_read_by_the_package(
    one: dict[str, Any], two: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("concatenate")
    first, second = tensors_of(one), tensors_of({name: what for name, what in two.items() if name not in one})
    save_file(first, folder / "first.safetensors")
    save_file(second, folder / "second.safetensors")
    concatenate(folder / "x.safetensors", parts_of(folder / "first.safetensors", folder / "second.safetensors"))
    assert same(load_file(folder / "x.safetensors"), first | second)


def test_tensors_keep_their_order(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "a",
        {"z": torch.ones(2), "a": torch.ones(4, dtype=torch.int16), "m": torch.ones(1, dtype=torch.int64)},
    )
    concatenate(tmp_path / "b", parts_of(tmp_path / "a")[::-1])
    assert list(read_header(tmp_path / "a")) == ["z", "a", "m"]
    assert list(read_header(tmp_path / "b")) == ["m", "a", "z"]


def test_every_tensor_starts_at_an_aligned_byte(tmp_path: Path) -> None:
    odd = {"bytes": torch.ones(3, dtype=torch.uint8), "half": torch.ones(1, dtype=torch.float16), "wide": torch.ones(2)}
    write_tensors(tmp_path / "x", odd)
    assert all(info.start % info.dtype.itemsize == 0 for info in read_header(tmp_path / "x").values())
    assert same(load_file(tmp_path / "x"), odd)


def test_header_is_padded_and_has_metadata(tmp_path: Path) -> None:
    for length in range(8):
        write_tensors(tmp_path / "x", {"n" * (length + 1): torch.ones(1)})
        assert next(iter(read_header(tmp_path / "x").values())).start % 8 == 0
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensor_longer_than_the_buffer_is_copied_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "_CHUNK", 16)
    tensors = {"long": tensor_of(torch.uint8, (16 * 5 + 3,)), "short": tensor_of(torch.uint8, (7,))}
    save_file(tensors, tmp_path / "a")
    concatenate(tmp_path / "b", parts_of(tmp_path / "a"))
    assert same(load_file(tmp_path / "b"), tensors)


def test_strided_and_shared_tensors_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": base.T, "slice": base[:, 1:3], "again": base, "leaf": base.clone().requires_grad_()}
    write_tensors(tmp_path / "x", tensors)
    assert all(loaded.equal(tensors[name]) for name, loaded in load_file(tmp_path / "x").items())


def test_single_element_of_any_stride_is_written(tmp_path: Path) -> None:
    """torch calls such a tensor contiguous with any stride, and keeps the stride in a reshape."""
    tensor = torch.arange(4, dtype=torch.int32)[1:3].as_strided((1, 1), (1, 2))
    write_tensors(tmp_path / "x.safetensors", {"a": tensor})
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [[1]]


def test_read_tensor_owns_its_memory(tmp_path: Path) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "x")
    tensor = read_tensor(tmp_path / "x", read_header(tmp_path / "x")["x"])
    tensor.zero_()
    assert load_file(tmp_path / "x")["x"].equal(torch.ones(4))


def test_duplicate_name_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="occurs twice"):
        concatenate(tmp_path / "b", parts_of(tmp_path / "a", tmp_path / "a"))
    assert not (tmp_path / "b").exists()


def test_unsupported_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        write_tensors(tmp_path / "x", {"x": torch.ones(1, dtype=torch.complex128)})


@pytest.mark.parametrize("cut", [0, 7, 8, 20, -1])
def test_truncated_file_error_has_both_sizes(cut: int, tmp_path: Path) -> None:
    whole = save({"x": torch.ones(4)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[:cut])
    size = len(whole[:cut])
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is truncated: found {size} bytes, expected") as caught:
        read_header(path)
    assert "again" in caught.value.hint
    if cut == -1:
        assert f"expected {len(whole)}" in str(caught.value)


def test_shrunken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"x": torch.ones(4)}))
    info = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is truncated"):
        read_tensor(path, info)
    with pytest.raises(CheckpointError, match="is truncated"):
        concatenate(tmp_path / "y.safetensors", [(path, "x", info)])
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


LIES: dict[str, tuple[Any, bytes, str]] = {
    "hole": ({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, bytes(3), "starts at byte"),
    "overlap": ({"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)}, bytes(3), "starts at byte"),
    "late start": ({"x": entry("U8", [1], 4, 5)}, bytes(5), "starts at byte"),
    "backwards": ({"x": entry("U8", [0], 1, 0)}, bytes(1), "is invalid"),
    "outside": ({"x": entry("U8", [100], 0, 100)}, bytes(4), "is truncated"),
    "bytes left over": ({"x": entry("U8", [1], 0, 1)}, bytes(2), "follow the last tensor"),
    "size against shape": ({"x": entry("F32", [2], 0, 4)}, bytes(4), "does not match F32"),
    "scalar of no bytes": ({"x": entry("F32", [], 0, 0)}, b"", "does not match F32"),
    "odd number of 4-bit values": ({"x": entry("F4", [3], 0, 1)}, bytes(1), "does not match F4"),
    "negative offset": ({"x": entry("U8", [1], -1, 0)}, bytes(1), "is invalid"),
    "negative shape": ({"x": entry("U8", [-1, -1], 0, 1)}, bytes(1), "is invalid"),
    "truth for a number": ({"x": entry("U8", [True], 0, 1)}, bytes(1), "is invalid"),
    "fraction": ({"x": entry("U8", [1.0], 0, 1)}, bytes(1), "is invalid"),
    "dimension beyond 64 bits": ({"x": entry("U8", [0, 1 << 70], 0, 0)}, b"", "is invalid"),
    "unknown dtype": ({"x": entry("Q4", [1], 0, 1)}, bytes(1), "dtype Q4"),
    "missing key": ({"x": {"dtype": "U8", "shape": [1]}}, bytes(1), "is invalid"),
    "no object for a tensor": ({"x": 3}, b"", "is invalid"),
    "list": ([], b"", "is a list"),
    "no JSON": (b"{", b"", "cannot be parsed"),
    "no UTF-8": (b'{"\xff":0}', b"", "cannot be parsed"),
    "half a surrogate pair": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "cannot be parsed"),
    "nesting": (b"[" * 200_000, b"", "cannot be parsed"),
    "digits": (b'{"x":' + b"1" * 10_000 + b"}", b"", "cannot be parsed"),
    "one name twice": (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":0}', b"", "occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_inconsistent_header_is_refused(lie: str, tmp_path: Path) -> None:
    header, data, message = LIES[lie]
    with pytest.raises(CheckpointError, match=message):
        read_header(raw_file(tmp_path / "x", header, data))


def test_absurd_header_length_is_refused_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", 1 << 60) + bytes(100))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)


def test_git_lfs_pointer_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer") as caught:
        read_header(path)
    assert "git lfs pull" in caught.value.hint


def test_missing_file_and_missing_folder_raise_different_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        read_header(tmp_path / "absent")
    with pytest.raises(StorageError, match="absent"):
        write_tensors(tmp_path / "absent" / "x", {})


def test_unreadable_source_raises_checkpoint_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(1)})
    parts = parts_of(tmp_path / "a")
    (tmp_path / "a").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        concatenate(tmp_path / "b", parts)
    assert list(tmp_path.iterdir()) == []


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError])
def test_failed_write_leaves_no_file(failure: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(StorageError if failure is OSError else failure), replacing(path) as file:
        file.write(b"new")
        raise failure
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("x", b"old")]
