"""The experts' op and both of its kernels against the reference; invalid arguments; tracing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16_experts import cpu, gpu, op, reference
from tests.kernels.cases import grouped, in_numpy, weight_in
from tests.kernels.experts import (
    HALF_UNIT,
    ROUTINGS,
    arguments,
    assert_is_the_definition,
    weights_of,
)

BITS = (2, 3, 4, 5, 6, 7, 8)
TINY = gpu.Tiles(16, 32, 4, 2)
KERNELS: dict[str, Callable[..., Tensor]] = {
    "torch": cpu.experts,
    "alone": partial(gpu.experts, tiles=gpu.ALONE),
    "grouped": partial(gpu.experts, tiles=TINY),
}


def run(kernel: str, case: dict[str, Any]) -> Tensor:
    """Run one of the implementations without the op."""
    return KERNELS[kernel](**grouped(case))


def test_reference_multiplies_pairs_independently() -> None:
    values = in_numpy(arguments(dtype=torch.float32))
    expected = np.einsum("pk,pnk->pn", values["x"][values["token"]], weights_of(values)[values["expert"]])
    products = reference.experts(**grouped(values))
    np.testing.assert_allclose(products, expected + values["bias"][values["expert"]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [16, 32, 128, None])
@pytest.mark.parametrize("bits", BITS)
def test_op_equals_the_reference(bits: int, group: int | None, symmetric: bool) -> None:
    for dtype in HALF_UNIT:
        case = arguments(bits=bits, group=group, symmetric=symmetric, bias=symmetric, dtype=dtype)
        assert_is_the_definition(op.w4a16_experts(**case), case)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_routing_equals_the_reference(kernel: str, routing: str) -> None:
    case = arguments(routing, N=33, K=128)
    assert_is_the_definition(run(kernel, case), case)


@pytest.mark.parametrize(
    ("group", "K", "symmetric", "bias"),
    [
        (32, 172, False, True),
        (64, 320, True, False),
        (96, 192, False, False),
        (128, 256, True, True),
        (256, 384, False, False),
        (None, 200, False, True),
        (None, 128, True, False),
    ],
)
@pytest.mark.parametrize("kernel", ["alone", "grouped"])
def test_kernels_support_every_grouping(kernel: str, group: int | None, K: int, symmetric: bool, bias: bool) -> None:
    case = arguments(K=K, group=group, symmetric=symmetric, bias=bias)
    assert gpu.covers(case["x"], weight_in(case))
    assert_is_the_definition(run(kernel, case), case)


@pytest.mark.parametrize("kernel", ["alone", "grouped"])
def test_rows_of_x_may_have_any_strides(kernel: str) -> None:
    case = arguments(K=128)
    for strided in (case["x"].T.contiguous().T, torch.cat([case["x"], case["x"]], dim=1)[:, :128]):
        assert not strided.is_contiguous()
        assert run(kernel, case | {"x": strided}).equal(run(kernel, case))


def test_unsupported_weights_are_left_to_torch() -> None:
    half, weight = torch.zeros(1, 64, dtype=torch.float16), weight_in(arguments(K=64))
    assert gpu.covers(half, weight)
    assert not gpu.covers(half, weight._replace(bits=8))
    assert not gpu.covers(half, weight._replace(columns_per_group=16))
    assert not gpu.covers(half.float(), weight)


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12), block_m=st.sampled_from((16, 32, 64)))
def test_launch_has_enough_blocks_for_every_pair(counts: list[int], block_m: int) -> None:
    needed = sum(-(-count // block_m) for count in counts)
    assert needed <= gpu.most_blocks(sum(counts), len(counts), block_m)


def test_blocks_grow_with_the_number_of_pairs() -> None:
    assert [gpu.tiles_for(P, 8).block_m for P in (1, 8, 9, 128, 129, 256, 257, 10**6)] == [1, 1, 16, 16, 32, 32, 64, 64]
    assert [gpu.tiles_for(P, 128).block_m for P in (8, 64, 65, 2048, 2049)] == [1, 1, 16, 16, 32]


def test_pairs_are_sorted_by_expert() -> None:
    pairs, first_pair = gpu.sorted_pairs(torch.tensor([3, 0, 3, 1, 0]), 5)
    assert pairs.tolist() == [1, 4, 3, 0, 2]
    assert first_pair.tolist() == [0, 2, 3, 3, 5, 5]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    case = arguments()
    return case | {name: change(case[name])}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (arguments() | {"bits": 9}, "bits is 9"),
        (arguments() | {"in_features": 0}, "in_features is 0"),
        (changed("x", lambda x: x.double()), r"x is torch\.float64"),
        (changed("x", lambda x: x[0]), r"x is torch\.float16 \(172,\)"),
        (changed("token", lambda t: t.unsqueeze(0)), r"token is torch\.int32 \(1, 6\)"),
        (changed("token", lambda t: t.float()), "token: found"),
        (changed("expert", lambda e: e[:-1]), "expert: found"),
        (changed("words", lambda w: w[0]), "words of 4 bits: found"),
        (changed("words", lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)), "words of 4 bits: found strides"),
        (changed("scales", lambda s: s[:, 1:]), "scales: found"),
        (changed("zeros", lambda z: z.int()), "zeros: found"),
        (changed("zeros", lambda z: z.to("meta")), "zeros: found on meta"),
        (changed("bias", lambda b: b[:, 1:].contiguous()), "bias: found"),
        (changed("token", lambda t: t + 1), "token: found 1 to 3, expected 0 to 2"),
        (changed("expert", lambda e: e - 1), "expert: found -1 to 2, expected 0 to 3"),
    ],
)
def test_invalid_arguments_are_refused(case: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        op.w4a16_experts(**case)


@pytest.mark.parametrize("routing", ["spread", "nothing"])
def test_torch_accepts_the_op(routing: str) -> None:
    case = arguments(routing, N=8, K=64, dtype=torch.float32)
    case["x"].requires_grad_()
    torch.library.opcheck(op.w4a16_experts, tuple(case.values()))


def test_shapes_are_known_on_meta() -> None:
    case = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments().items()}
    y = op.w4a16_experts(**case)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (6, 40), torch.float16)


def test_compiles_as_one_graph() -> None:
    case = arguments(dtype=torch.float32)
    compiled = torch.compile(lambda case: op.w4a16_experts(**case) * 2, fullgraph=True, backend="aot_eager")
    assert compiled(case).equal(op.w4a16_experts(**case) * 2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradient_sums_over_the_pairs_of_a_token(routing: str) -> None:
    """Within float32's bound for sums over N rows of each pair and over the pairs."""
    case = arguments(routing, dtype=torch.float32)
    case["x"].requires_grad_()
    y = op.w4a16_experts(**case)
    outgoing = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(outgoing)
    values = in_numpy(case)
    W, g = weights_of(values)[values["expert"]], outgoing.double().numpy()
    expected, magnitude = np.zeros_like(values["x"]), np.zeros_like(values["x"])
    np.add.at(expected, values["token"], np.einsum("pn,pnk->pk", g, W))
    np.add.at(magnitude, values["token"], np.einsum("pn,pnk->pk", np.abs(g), np.abs(W)))
    error = (W.shape[1] + len(W) + 4) * HALF_UNIT[torch.float32] * magnitude
    assert np.all(np.abs(case["x"].grad.double().numpy() - expected) <= error)


def test_at_most_one_expert_is_unpacked_at_a_time(largest_tensor: Any) -> None:
    case = arguments("all in one", N=256, K=512, dtype=torch.float32)
    with largest_tensor:
        op.w4a16_experts(**case)
    assert largest_tensor.bytes <= 256 * 512 * 4
