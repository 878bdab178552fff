"""The int4 product of torch against the reference, within bfloat16, and when it is used."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import cpu, int4pack, layout, op, reference, small_batches
from llmq_kernels.w4a16.packed_weight import PackedWeight
from tests.kernels.cases import in_numpy, weight_in

HALF = 2.0**-8  # half a unit in the last place of bfloat16, relative


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without measuring the processor, so that the path of a test does not depend on other load."""
    monkeypatch.setenv(small_batches.VARIABLE, "on")
    if not small_batches.choose(4).rows:
        pytest.skip(small_batches.describe(4))
    yield
    small_batches._choose.cache_clear()


def weight(N: int, K: int, *, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The weight's arguments of the op: random codes, scales of both signs, zeros from one end of the codes to past
    the other."""
    generator = torch.Generator().manual_seed(N + K)
    G = -(-K // group)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 17, (G, N), generator=generator, dtype=torch.int16)
    return {
        "words": layout.pack(codes, 4),
        "scales": torch.randn(G, N, generator=generator).to(dtype),
        "zeros": None if symmetric else zeros,
        "bits": 4,
        "in_features": K,
        "columns_per_group": group,
    }


def prepared(weight: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pair = small_batches.prepare(weight_in(weight))
    assert pair is not None
    return pair


def with_pair(weight: dict[str, Any]) -> PackedWeight[Any]:
    codes, grid = prepared(weight)
    return weight_in(weight)._replace(cpu_words=codes, cpu_grid=grid)


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(x: Tensor, weight: dict[str, Any], bias: Tensor | None = None, column_order: Tensor | None = None) -> Tensor:
    pair = dict(zip(("cpu_words", "cpu_grid"), prepared(weight), strict=True))
    return op.w4a16_linear(x=x, bias=bias, column_order=column_order, **weight, **pair)


def assert_is_the_definition_in_bfloat16(y: Tensor, x: Tensor, weight: dict[str, Any], bias: Any, order: Any) -> None:
    """Within one rounding of x, scale, shift, weight and y each, to first order with one part in 2**6 for the second.

    The weight is (code - 8) * scale + shift, so the roundings of scale and shift are relative to these two summands.
    """
    packed = weight_in(in_numpy(weight))
    X = x.double().numpy() if order is None else x.double().numpy()[..., order.numpy()]
    W = reference.dequantize(packed)
    around_eight = reference.dequantize(packed._replace(zeros=None))  # (code - 8) * scale
    summands = np.abs(around_eight) + np.abs(W - around_eight)  # (N, K)
    exact = X @ W.T
    bound = HALF * (np.abs(X) @ (2 * np.abs(W) + summands).T + np.abs(exact)) * (1 + 2.0**-6)
    bound = bound + 2.0**-23 * weight["in_features"] * (np.abs(X) @ summands.T)  # float32 sums
    expected = exact if bias is None else exact + bias.double().numpy()
    bound = bound + {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: HALF}[y.dtype] * np.abs(expected)
    assert y.shape == expected.shape
    assert np.all(np.abs(y.double().numpy() - expected) <= bound)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("N", "K", "group"), [(16, 32, 32), (48, 192, 64), (64, 256, 128), (80, 512, 256), (32, 1024, 512), (16, 96, 96)]
)
def test_few_rows_equal_the_reference_in_bfloat16(N: int, K: int, group: int, symmetric: bool) -> None:
    made = weight(N, K, group=group, symmetric=symmetric)
    for lead in ((1,), (2, 8), ()):
        x = random_x(*lead, K)
        assert_is_the_definition_in_bfloat16(run(x, made), x, made, None, None)


@pytest.mark.parametrize("K", [128, 160, 384])
def test_one_scale_per_row_is_repeated(K: int) -> None:
    made = weight(32, K, group=K, symmetric=False)
    x = random_x(3, K)
    assert_is_the_definition_in_bfloat16(run(x, made), x, made, None, None)


def test_partial_last_group_keeps_its_scale() -> None:
    made = weight(16, 160, group=128, symmetric=False)
    x = random_x(3, 160)
    assert prepared(made)[1].shape == (5, 16, 2)
    assert_is_the_definition_in_bfloat16(run(x, made), x, made, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bias_and_column_order_in_every_dtype(dtype: torch.dtype) -> None:
    made, x, bias = weight(48, 192, dtype=dtype), random_x(3, 192, dtype=dtype), random_x(48, dtype=dtype)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(2))
    y = run(x, made, bias, order)
    assert y.dtype == dtype
    assert_is_the_definition_in_bfloat16(y, x, made, bias, order)


def test_packing_in_pieces_equals_packing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = weight(208, 64)
    whole = prepared(made)[0]
    monkeypatch.setattr(int4pack, "ROWS_AT_ONCE", 64)
    assert prepared(made)[0].equal(whole)


@pytest.mark.parametrize(
    ("N", "K", "change"),
    [
        (17, 64, {}), (24, 64, {}), (0, 64, {}), (16, 80, {}),
        (16, 48, {"columns_per_group": 48}), (16, 64, {"columns_per_group": 16}),
        (16, 64, {"zeros": torch.full((2, 16), 17, dtype=torch.int16)}),
        (16, 64, {"zeros": torch.full((2, 16), -1, dtype=torch.int16)}),
    ],
)  # fmt: skip
def test_unsupported_weights_get_no_int4_copy(N: int, K: int, change: dict[str, Any]) -> None:
    made = weight(N, K, group=change.get("columns_per_group", 32)) | change
    assert small_batches.prepare(weight_in(made)) is None


def test_other_widths_and_devices_get_no_copy() -> None:
    made = weight(16, 64)
    three = made | {"bits": 3, "words": layout.pack(torch.zeros(16, 64, dtype=torch.uint8), 3)}
    assert small_batches.prepare(weight_in(three)) is None
    elsewhere = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in made.items()}
    assert small_batches.prepare(weight_in(elsewhere)) is None


def test_more_rows_than_the_limit_are_exact() -> None:
    made, limit = weight(32, 128), small_batches.choose(4).rows
    x = random_x(limit + 1, 128)
    exact = cpu.linear(x, weight_in(made), None)
    assert run(x, made).equal(exact)
    assert not run(x[:limit], made).equal(exact[:limit]), "the limit itself runs in bfloat16"


def test_gradients_come_from_the_words() -> None:
    made, x = weight(32, 128), random_x(2, 128).requires_grad_()
    run(x, made).sum().backward()
    bare = x.detach().clone().requires_grad_()
    op.w4a16_linear(x=bare, bias=None, column_order=None, **made).sum().backward()
    assert x.grad is not None and bare.grad is not None
    assert x.grad.equal(bare.grad)


@pytest.mark.parametrize("trained", [False, True], ids=["inference", "trained"])
def test_torch_accepts_the_op_with_an_int4_copy(trained: bool) -> None:
    made, x = weight(16, 64, symmetric=False), random_x(2, 64).requires_grad_(trained)
    torch.library.opcheck(op.w4a16_linear, (x, random_x(16), *with_pair(made)))


REFUSED = {
    "one": ({"cpu_grid": None}, "found one of them, expected both or neither"),
    "words": ({"cpu_words": torch.zeros(32, 64, dtype=torch.int8)}, "cpu_words: found torch.int8"),
    "rows": (
        {"cpu_words": torch.zeros(16, 64, dtype=torch.uint8)},
        r"cpu_words: found .*\(16, 64\), expected .*\(32",
    ),
    "grid": ({"cpu_grid": torch.zeros(4, 32, 2)}, "cpu_grid: found torch.float32"),
    "pieces": (
        {"cpu_grid": torch.zeros(3, 32, 2, dtype=torch.bfloat16)},
        "cpu_grid: found 3 pieces of 128 columns, expected 32 to 256 columns per piece",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_int4_copy_of_another_shape_is_refused(change: dict[str, Any], message: str) -> None:
    made = weight(32, 128)
    pair = dict(zip(("cpu_words", "cpu_grid"), prepared(made), strict=True)) | change
    with pytest.raises(KernelInputError, match=message):
        op.w4a16_linear(x=random_x(1, 128), bias=None, column_order=None, **made, **pair)


def test_direct_call_equals_the_op() -> None:
    """`op.linear` skips the dispatcher, except with gradients, tracing, modes and other tensors."""
    made, x = weight(32, 128), random_x(2, 128)
    packed = with_pair(made)
    assert op.linear(x, packed, None).equal(op.w4a16_linear(x, None, *packed))
    compiled = torch.compile(op.linear, fullgraph=True, backend="eager")
    assert compiled(x, packed, None).equal(op.linear(x, packed, None))
    trained = x.clone().requires_grad_()
    op.linear(trained, packed, None).sum().backward()
    assert trained.grad is not None


def test_tracing_records_one_op() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    made, x = weight(32, 128), random_x(2, 128)
    packed = with_pair(made)
    traced = make_fx(lambda x: op.linear(x, packed, None))(x)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.llmq.w4a16_linear.default]


def test_setting_off_disables_int4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(small_batches.VARIABLE, "off")
    assert small_batches.prepare(weight_in(weight(16, 64))) is None
    assert small_batches.describe(4) == "torch's int4 product on CPU: not used (LLMQ_CPU_INT4=off)"


def test_unknown_setting_warns_and_means_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(small_batches.VARIABLE, "maybe")
    with pytest.warns(UserWarning, match="LLMQ_CPU_INT4='maybe' is not one of auto, on, off"):
        assert "measured" in small_batches.choose(4).reason


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({16: 0.5, 4: 0.5, 1: 0.5}, 16),
        ({16: 0.9, 4: 0.5, 1: 0.5}, 4),
        ({16: 3, 4: 2, 1: 0.7}, 1),
        ({16: 3, 4: 3, 1: 3}, 0),
    ],
)
def test_limit_is_the_largest_that_is_faster_by_a_margin(
    seconds: dict[int, float], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = iter(small_batches.LIMITS)
    monkeypatch.setattr(small_batches, "best_seconds", lambda *calls: [seconds[next(rungs)], 1.0])
    monkeypatch.setenv(small_batches.VARIABLE, "auto")
    assert small_batches.choose(4).rows == rows
    assert ("up to" in small_batches.describe(4)) == (rows > 0)


def test_torch_without_the_op_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: int) -> None:
        raise AttributeError("'_OpNamespace' 'aten' object has no attribute '_convert_weight_to_int4pack_for_cpu'")

    monkeypatch.setattr(small_batches.Trial, "make", missing)
    for setting in ("auto", "on"):
        monkeypatch.setenv(small_batches.VARIABLE, setting)
        small_batches._choose.cache_clear()
        assert small_batches.choose(4).rows == 0
        assert "no attribute '_convert_weight_to_int4pack_for_cpu'" in small_batches.describe(4)


def bytes_(N: int, K: int) -> dict[str, Any]:
    """A symmetric weight of 8 bits with one scale per row."""
    generator = torch.Generator().manual_seed(N + K)
    words = layout.pack(torch.randint(0, 256, (N, K), generator=generator, dtype=torch.uint8), 8)
    scales = torch.randn(1, N, generator=generator)
    return {"words": words, "scales": scales, "zeros": None, "bits": 8, "in_features": K, "columns_per_group": K}


@pytest.mark.parametrize(("M", "N", "K"), [(1, 17, 64), (3, 48, 192), (16, 1, 128)])
def test_bytes_are_the_definition_in_bfloat16(M: int, N: int, K: int) -> None:
    made, x, bias = bytes_(N, K), random_x(M, K), random_x(N)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    assert_is_the_definition_in_bfloat16(run(x, made, bias, order), x, made, bias, order)
    exact = cpu.linear(random_x(17, K), weight_in(made), None)
    assert run(random_x(17, K), made).equal(exact), "more rows than the limit"


@pytest.mark.parametrize(
    "change",
    [
        {"zeros": torch.zeros(1, 16, dtype=torch.int16)},
        {"scales": torch.ones(2, 16), "columns_per_group": 32},
        {"words": layout.pack(torch.zeros(16, 80, dtype=torch.uint8), 8), "in_features": 80, "columns_per_group": 80},
    ],
    ids=["zeros", "groups", "columns"],
)
def test_other_weights_of_8_bits_get_no_copy(change: dict[str, Any]) -> None:
    assert small_batches.prepare(weight_in(bytes_(16, 64) | change)) is None


def test_columns_that_torch_would_read_past_are_refused() -> None:
    made = bytes_(16, 80)
    pair = {"cpu_words": torch.zeros(16, 80, dtype=torch.int8), "cpu_grid": torch.ones(16, dtype=torch.bfloat16)}
    with pytest.raises(KernelInputError, match="found 80 columns, expected a multiple of 64"):
        op.w4a16_linear(x=random_x(1, 80), bias=None, column_order=None, **made, **pair)
