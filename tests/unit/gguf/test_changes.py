"""Rows, columns and values of a tensor in a GGUF file can be changed back."""

import numpy as np
import pytest

from llmq.errors import FormatError
from llmq.gguf import changes, hybrids
from llmq.gguf.architecture import Stacked
from llmq.gguf.experts import separated
from llmq.gguf.writer import Stored

DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 4, "linear_value_head_dim": 8
}  # fmt: skip


@pytest.mark.parametrize("rows", [hybrids.divided_qkvz, *hybrids.TILED.values()])
def test_rows_can_be_put_back(rows: changes.Rows) -> None:
    orders = rows(DELTA)
    weight = np.arange(sum(map(len, orders.values())))[:, None] * np.ones((1, 3))
    parts = [(order, weight[order]) for order in orders.values()]
    assert np.array_equal(changes.undone(parts), weight)


@pytest.mark.parametrize("value", [changes.ONE_MORE, changes.DECAY, changes.TRANSPOSED, changes.PER_CHANNEL])
def test_values_can_be_changed_back(value: changes.Value) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 1, 3)).astype(np.float32)
    changed = value.forward(weight)
    assert changed.shape == value.shape(weight.shape)
    assert np.allclose(value.backward(changed), weight)


def test_blocks_move_only_where_the_order_keeps_them_together() -> None:
    order = hybrids.tiled_columns(DELTA)
    weight = np.arange(2 * len(order)).reshape(2, -1)
    assert np.array_equal(changes.in_columns(weight, order, 1), weight[:, order])
    assert np.array_equal(changes.in_columns(weight, order, 8), weight[:, order])
    with pytest.raises(FormatError, match="divides blocks of 16"):
        changes.in_columns(weight, order, 16)


@pytest.mark.parametrize("form", [Stacked(), Stacked(in_turn=True, transposed=True)])
def test_stacked_experts_are_separated(form: Stacked) -> None:
    experts = np.random.default_rng(0).normal(size=(2, 6, 5))
    stored = experts.swapaxes(1, 2) if form.transposed else experts
    tensor = Stored("model.layers.0.mlp.experts.gate_up_proj", None, stored.shape, lambda: stored)
    gate, up = list(separated([tensor], form))[2:]
    assert (gate.name, gate.shape) == ("model.layers.0.mlp.experts.1.gate_proj.weight", (3, 5))
    assert np.array_equal(gate.read(), experts[1, 0::2] if form.in_turn else experts[1, :3])
    assert np.array_equal(up.read(), experts[1, 1::2] if form.in_turn else experts[1, 3:])
