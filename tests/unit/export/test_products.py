"""Quantized weights are recognized in the weights of products by their values."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.export.onnx.products import Columns, KnownWeights, Matrix
from llmq.runtime.checkpoint_weights import PackedWeights

LAYER = "model.layers.0.self_attn"
Q, K, V = (f"{LAYER}.{name}_proj" for name in "qkv")


@pytest.fixture(scope="module")
def packed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> PackedWeights:
    out = tmp_path_factory.mktemp("packed") / "out"
    model = checkpoint("llama", dtype="bfloat16", num_hidden_layers=1)
    llmq.quantize(str(model), out, method="rtn", scales="minmax", group_size=16, validate=0, skip=["*v_proj"])
    return PackedWeights(Checkpoint.open(out))


def transposed(packed: PackedWeights, *names: str) -> Matrix:
    """(K, N) of weights side by side; those that are not packed are floats."""
    return np.concatenate([packed.tensor(f"{name}.weight").float().numpy().T for name in names], axis=1)


def test_single_and_stacked_weights_are_recognized(packed: PackedWeights) -> None:
    known = KnownWeights(packed)
    assert known.columns(transposed(packed, Q)) == [Columns(Q, 0, 32)]
    assert known.columns(transposed(packed, K, Q)) == [Columns(K, 0, 16), Columns(Q, 16, 48)]


def test_float_columns_next_to_quantized_ones_stay_floats(packed: PackedWeights) -> None:
    known = KnownWeights(packed)
    stacked = transposed(packed, V, Q, V, K, V)
    assert known.columns(stacked) == [
        Columns(None, 0, 16), Columns(Q, 16, 48), Columns(None, 48, 64), Columns(K, 64, 80), Columns(None, 80, 96),
    ]  # fmt: skip
    assert known.columns(transposed(packed, V)) == [Columns(None, 0, 16)]


def test_a_weight_that_differs_in_one_value_is_not_recognized(packed: PackedWeights) -> None:
    matrix = transposed(packed, Q)
    matrix[-1, -1] += 1e-3
    assert KnownWeights(packed).columns(matrix) == [Columns(None, 0, 32)]
    assert KnownWeights(packed).columns(transposed(packed, Q)[:, :-1]) == [Columns(None, 0, 31)]


def test_equal_weights_are_recognized_one_after_the_other(packed: PackedWeights) -> None:
    known = KnownWeights(packed)
    known._first_rows["copy"] = known._first_rows[Q]
    known._by_corner[float(known._first_rows[Q][0])].append("copy")
    original, shape = packed.weight, packed.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "weight", lambda name: original(Q if name == "copy" else name))
        patch.setattr(packed, "shape", lambda name: shape(Q if name == "copy" else name))
        matrix = transposed(packed, Q)
        modules = [part.module for _ in range(3) for part in known.columns(matrix)]
    assert modules == [Q, "copy", Q]
