"""The op against its reference, over widths, groups, zero points and shapes; invalid arguments; tracing."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import cpu, layout, op, reference
from llmq_kernels.w4a16.packed_weight import PackedWeight
from tests.kernels.cases import grouped, in_numpy, weight_in

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (16, 32, 64, 128, 256, None)  # None: one group per row
SHAPES = (((1,), 33, 172), ((17,), 7, 352), ((2, 3), 1, 128), ((0,), 5, 172), ((), 6, 40))  # x's leading shape, N, K
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def arguments(
    lead: tuple[int, ...],
    N: int,
    K: int,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = False,
    bias: bool = False,
    ordered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random arguments of the op in its order; scales have both signs, zero points pass the codes by one."""
    generator = torch.Generator().manual_seed(K + bits)
    per_group = group or K
    G = -(-K // per_group)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(-1, (1 << bits) + 1, (G, N), generator=generator, dtype=torch.int16)
    return {
        "x": torch.randn(*lead, K, generator=generator).to(dtype),
        "bias": torch.randn(N, generator=generator).to(dtype) if bias else None,
        "words": layout.pack(codes, bits),
        "scales": torch.randn(G, N, generator=generator).to(dtype),
        "zeros": None if symmetric else zeros,
        "bits": bits,
        "in_features": K,
        "columns_per_group": per_group,
        "column_order": torch.randperm(K, generator=generator) if ordered else None,
    }


def weight_of(values: dict[str, Any]) -> NDArray[np.float64]:
    """(N, K) float64 in the natural order of x's columns."""
    W = reference.dequantize(weight_in(values))
    return W if values["column_order"] is None else W[:, np.argsort(values["column_order"])]


def assert_is_the_definition(y: Tensor, arguments: dict[str, Any]) -> None:
    """Within the bound of float32 arithmetic for a sum of K products, and one rounding to the output's dtype.

    In float32 with rounding unit u, a dot product of K terms in any order is off by at most K u sum |w| |x| to first
    order; the weight's own rounding and the bias add one u each.  Two more cover the second order, (K u)^2 < 2 u.
    """
    values = in_numpy(arguments)
    expected = reference.linear(**grouped(values))
    magnitude = np.abs(values["x"]) @ np.abs(weight_of(values)).T
    if values["bias"] is not None:
        magnitude = magnitude + np.abs(values["bias"])
    error = (values["in_features"] + 4) * ROUNDING[torch.float32] * magnitude
    error = error + ROUNDING[y.dtype] * (np.abs(expected) + error) + SMALLEST[y.dtype]
    assert y.shape == expected.shape
    assert np.all(np.abs(y.double().numpy() - expected) <= error)


def assert_is_the_gradient(gradient: Tensor, outgoing: Tensor, arguments: dict[str, Any]) -> None:
    """Within the same bound in float32, the sum running over N rows."""
    W, g = weight_of(in_numpy(arguments | {"x": None})), outgoing.double().numpy()
    expected, magnitude = g @ W, np.abs(g) @ np.abs(W)
    assert gradient.shape == expected.shape
    error = (W.shape[0] + 4) * ROUNDING[torch.float32] * magnitude
    assert np.all(np.abs(gradient.double().numpy() - expected) <= error)


def test_reference_equals_a_hand_computed_example() -> None:
    """Two groups of two columns, one row: w = [2 (5 - 3), 2 (1 - 3), -0.5 (0 - 4), -0.5 (7 - 4)] = [4, -4, 2, -1.5]."""
    words = reference.pack(np.array([[5, 1, 0, 7]], np.uint8), 3)
    weight = PackedWeight(words, np.array([[2.0], [-0.5]]), np.array([[3], [4]], np.int16), 3, 4, 2)
    np.testing.assert_array_equal(reference.dequantize(weight), [[4, -4, 2, -1.5]])
    x, bias, order = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([0.25]), np.array([3, 0, 2, 1])
    assert reference.linear(x, weight, bias) == 4 - 40 + 200 - 1500 + 0.25
    assert reference.linear(x, weight._replace(column_order=order), None) == 4000 - 4 + 200 - 15
    middle = reference.dequantize(weight._replace(zeros=None))  # of three bits: 4
    np.testing.assert_array_equal(middle, [[2, -6, 2, -1.5]])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_op_equals_the_reference(bits: int, group: int | None, symmetric: bool) -> None:
    for lead, N, K in SHAPES:
        case = arguments(lead, N, K, bits=bits, group=group, symmetric=symmetric)
        assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_bias_and_column_order_in_every_dtype(bits: int, dtype: torch.dtype) -> None:
    case = arguments((3,), 9, 172, bits=bits, bias=True, ordered=True, dtype=dtype)
    y = op.w4a16_linear(**case)
    assert y.dtype == dtype
    assert_is_the_definition(y, case)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("scale", ROUNDING, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_scales_may_have_another_dtype_than_x(dtype: torch.dtype, scale: torch.dtype, index: torch.dtype) -> None:
    case = arguments((2,), 5, 96, bias=True, ordered=True)
    case |= {name: case[name].to(to) for name, to in (("x", dtype), ("scales", scale), ("column_order", index))}
    assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("per_group", [1, 24, 100, 172, 344, 1000])
def test_groups_of_any_width(per_group: int) -> None:
    """Files of other tools have odd group sizes, and tensor-parallel shards cut groups."""
    case = arguments((3,), 5, 344, group=per_group, symmetric=False)
    assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("zero", [-(1 << 15), (1 << 15) - 1])
def test_zero_points_far_outside_the_codes(zero: int) -> None:
    case = arguments((3,), 5, 64, bits=8)
    case["zeros"] = torch.full_like(case["zeros"], zero)
    assert_is_the_definition(op.w4a16_linear(**case), case)


def test_weight_at_its_zero_point_is_exactly_zero() -> None:
    case = arguments((1,), 5, 128, bits=2)
    case["words"] = layout.pack(torch.full((5, 128), 3, dtype=torch.uint8), 2)
    case["zeros"] = torch.full_like(case["zeros"], 3)
    assert not op.w4a16_linear(**case).any()


@pytest.mark.parametrize("bits", BITS)
def test_pieces_bound_the_memory(bits: int, monkeypatch: pytest.MonkeyPatch, largest_tensor: Any) -> None:
    """47 rows, five at a time: the last piece is shorter.  Modes of torch see no operations inside the op."""
    monkeypatch.setattr(cpu, "WEIGHTS_AT_ONCE", 5 * 384)
    case = arguments((3,), 47, 352, bits=bits, bias=True)
    with largest_tensor:
        y = cpu.linear(**grouped(case))
        gradient = cpu.input_gradient(y, weight_in(case))
    assert_is_the_definition(y, case)
    assert_is_the_gradient(gradient, y, case)
    assert largest_tensor.bytes <= 4 * 5 * 384  # one piece in float32; the whole weight would be nine pieces


def test_x_may_have_any_strides() -> None:
    case = arguments((4, 3), 5, 172)
    case["x"] = case["x"].transpose(0, 1).flip(0).expand(3, 4, 172)
    assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
@pytest.mark.parametrize("bits", BITS)
def test_gradient_of_x_is_outgoing_gradient_times_weight(bits: int, ordered: bool) -> None:
    case = arguments((2, 3), 33, 172, bits=bits, bias=True, ordered=ordered)
    case["x"].requires_grad_()
    y = op.w4a16_linear(**case)
    outgoing = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    y.backward(outgoing)
    assert_is_the_gradient(case["x"].grad, outgoing, case)


def test_column_used_twice_sums_its_gradients() -> None:
    case = arguments((1,), 1, 2, group=None, symmetric=True)
    case |= {"words": layout.pack(torch.tensor([[9, 11]], dtype=torch.uint8), 4), "scales": torch.ones(1, 1)}
    case["column_order"] = torch.tensor([1, 1])
    case["x"].requires_grad_()
    op.w4a16_linear(**case).sum().backward()
    assert case["x"].grad.tolist() == [[0.0, 1.0 + 3.0]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_trained_x_is_accepted_without_grad_mode(mode: Any) -> None:
    case = arguments((2,), 5, 64)
    case["x"].requires_grad_()
    with mode():
        y = op.w4a16_linear(**case)
    assert not y.requires_grad


def test_weight_without_rows_gives_no_features() -> None:
    case = arguments((2,), 0, 64)
    assert op.w4a16_linear(**case).shape == (2, 0)


def test_no_rows_have_an_empty_gradient() -> None:
    case = arguments((0, 4), 5, 64)
    case["x"].requires_grad_()
    op.w4a16_linear(**case).sum().backward()
    assert case["x"].grad.shape == (0, 4, 64)


@pytest.mark.parametrize("extras", [False, True], ids=["least", "all"])
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "trained"])
def test_torch_accepts_the_op(extras: bool, trained: bool) -> None:
    case = arguments((2, 3), 5, 172, symmetric=not extras, bias=extras, ordered=extras)
    case["x"].requires_grad_(trained)
    torch.library.opcheck(op.w4a16_linear, tuple(case.values()))


@pytest.mark.parametrize("ordered", [True, False])
def test_torch_accepts_the_gradient_op(ordered: bool) -> None:
    case = arguments((), 5, 172, ordered=ordered)  # 172: the last tile is partial, which must not affect the strides
    torch.library.opcheck(op.w4a16_input_gradient, (torch.randn(2, 3, 5), *weight_in(case)[:7]))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(op.w4a16_linear, fullgraph=True, backend="eager")
    for rows in (1, 5):
        case = arguments((rows,), 5, 172, bias=True)
        torch.testing.assert_close(compiled(**case), op.w4a16_linear(**case), rtol=0, atol=0)


def test_meta_tensors_have_the_shape_and_no_values() -> None:
    case = arguments((2, 3), 5, 172, bias=True, ordered=True, dtype=torch.bfloat16)
    y = op.w4a16_linear(**{name: v.to("meta") if isinstance(v, Tensor) else v for name, v in case.items()})
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 5), torch.bfloat16)


REFUSED = {
    "bits": ({"bits": 9}, "bits is 9, expected one of 2, 3, 4, 5, 6, 7, 8"),
    "other bits": ({"bits": 8}, r"words of 8 bits: found torch.int16 \(5, 64\), expected torch.int16 \(5, 128\)"),
    "no columns": ({"in_features": 0}, "in_features is 0"),
    "no group": ({"columns_per_group": 0}, "columns_per_group 0, expected at least 1"),
    "x dtype": ({"x": torch.zeros(2, 172, dtype=torch.float64)}, "x is torch.float64"),
    "x width": ({"x": torch.zeros(2, 171)}, r"x is torch.float32 \(2, 171\), expected .*\(..., 172\)"),
    "x scalar": ({"x": torch.tensor(1.0)}, r"x is torch.float32 \(\)"),
    "words dtype": ({"words": torch.zeros(5, 64, dtype=torch.int32)}, "words of 4 bits: found torch.int32"),
    "words rank": ({"words": torch.zeros(64, dtype=torch.int16)}, "words of 4 bits: found"),
    "words scalar": ({"words": torch.tensor(1, dtype=torch.int16)}, "words of 4 bits: found"),
    "words strides": ({"words": torch.zeros(64, 5, dtype=torch.int16).t()}, "expected contiguous"),
    "scales dtype": ({"scales": torch.zeros(6, 5, dtype=torch.float64)}, "scales: found torch.float64"),
    "scales turned": ({"scales": torch.zeros(5, 6)}, r"scales: found .*\(5, 6\), expected .*\(6, 5\)"),
    "scales strides": ({"scales": torch.zeros(5, 6).t()}, "scales: found strides"),
    "groups": ({"columns_per_group": 64}, r"scales: found .*\(6, 5\), expected .*\(3, 5\)"),
    "zeros dtype": ({"zeros": torch.zeros(6, 5)}, "zeros: found torch.float32"),
    "zeros shape": ({"zeros": torch.zeros(1, 5, dtype=torch.int16)}, "zeros: found"),
    "bias shape": ({"bias": torch.zeros(6)}, r"bias: found .*\(6,\), expected .*\(5,\)"),
    "bias dtype": ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias: found torch.int64"),
    "order shape": ({"column_order": torch.arange(171)}, "column_order: found"),
    "order dtype": ({"column_order": torch.zeros(172)}, "column_order: found torch.float32"),
    "device": (
        {"scales": torch.zeros(6, 5, device="meta")},
        "scales: found on meta, expected on cpu like the other tensors",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_name_what_was_expected(change: dict[str, Any], message: str) -> None:
    case = arguments((2,), 5, 172, bias=True, ordered=True) | change
    with pytest.raises(KernelInputError, match=message):
        op.check(**grouped(case))


def test_op_checks_its_arguments() -> None:
    case = arguments((2,), 5, 172)
    with pytest.raises(KernelInputError, match="scales: found strides"):
        op.w4a16_linear(**case | {"scales": torch.zeros(5, 6).t()})


def test_autocast_casts_x_as_for_torch_linear() -> None:
    given = arguments((3,), 24, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op.linear(**grouped(given))
        expected = torch.nn.functional.linear(given["x"], torch.zeros(24, 64)).dtype
    assert y.dtype == expected == torch.bfloat16
    assert torch.equal(y, op.linear(**grouped({**given, "x": given["x"].to(torch.bfloat16)})))


def test_trainable_bias_gets_no_gradient() -> None:
    """Without torch's dispatcher it would get one."""
    given = arguments((3,), 24, 64, bias=True)
    given["bias"].requires_grad_(True)
    for y in (op.linear(**grouped(given)), torch.ops.llmq.w4a16_linear(*given.values())):
        y.sum().backward()
        assert given["bias"].grad is None
