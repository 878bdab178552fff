"""The GPU kernels in Triton's interpreter (float16, plain branch) against the definition, with poisoned buffers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from llmq_kernels.w4a16 import chunks, configs, cpu, gpu, layout, reference
from tests.kernels.cases import grouped, in_numpy, weight_in

if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are compiled: test_gpu_w4a16.py", allow_module_level=True)

AFTER = configs.Config(16, 32, 4, 2, ctas_per_sm=0, scale="after")
BEFORE = configs.Config(16, 32, 4, 2, ctas_per_sm=0, scale="before")
HALF, SINGLE = 2.0**-11, 2.0**-24  # half a unit in the last place of float16 and float32


def machine(config: configs.Config = AFTER, *, processors: int = 1, crossover: int = 64) -> gpu.Machine:
    table = configs.Table(crossover, 16 * 256, (configs.Choice(crossover, config),), {})
    return gpu.Machine(table, processors, assembly=False)


def arguments(
    M: int, N: int, K: int, group: int | None, *, bits: int = 4, zeros: str = "random", extras: bool = False
) -> dict[str, Any]:
    """Random arguments of `gpu.linear`; scales have both signs; zeros are None, random or one number for all."""
    generator = torch.Generator().manual_seed(1000 * K + 10 * M + bits)
    per_group = group or K
    G = -(-K // per_group)
    given = {
        "none": None,
        "random": torch.randint(0, (1 << bits) + 1, (G, N), generator=generator, dtype=torch.int16),
    }
    return {
        "x": torch.randn(M, K, generator=generator).to(torch.float16),
        "bias": torch.randn(N, generator=generator) if extras else None,
        "words": layout.pack(torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8), bits),
        "scales": (torch.randn(G, N, generator=generator) / 64).to(torch.float16),
        "zeros": given[zeros] if zeros in given else torch.full((G, N), int(zeros), dtype=torch.int16),
        "bits": bits,
        "in_features": K,
        "columns_per_group": per_group,
        "column_order": torch.randperm(K, generator=generator) if extras else None,
    }


def assert_is_the_definition(y: Tensor, case: dict[str, Any], *, rounded_weight: bool = False) -> None:
    """Within K + 8 roundings of float32 for any order of the sums, one of the output, and one of W where it is rounded.

    Eight more than K: scaling of groups, splits, bias, and the second order.  A float16 W is off by at most half a unit
    of w, 2**-11 |w|, or half the smallest subnormal.
    """
    values = in_numpy(case)
    expected = reference.linear(**grouped(values))
    W = np.abs(reference.dequantize(weight_in(values)))
    x = np.abs(values["x"] if values["column_order"] is None else values["x"][..., values["column_order"]])
    bias = 0.0 if values["bias"] is None else np.abs(values["bias"])
    error = (values["in_features"] + 8) * SINGLE * (x @ W.T + bias)
    if rounded_weight:
        error = error + x @ (HALF * W + 2.0**-25).T
    error = error + HALF * (np.abs(expected) + error) + 2.0**-25
    assert y.shape == expected.shape and y.dtype == case["x"].dtype
    assert np.all(np.abs(y.double().numpy() - expected) <= error)


class RecordedProducts(TorchDispatchMode):
    """Inside `with`, records the names of the matrix products that torch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(function):
            self.products.append(str(function))
        return function(*args, **(kwargs or {}))


# M, N, K, columns in a group (None: the row): every number of planes per scale; K and N with partial tiles
SHAPES = [
    (1, 40, 256, 128),
    (3, 33, 352, 32),  # the last tile has three planes
    (17, 7, 320, 64),
    (2, 32, 384, 96),
    (5, 16, 512, 256),
    (3, 33, 300, 128),  # the last group is partial, and ends inside a plane
    (1, 20, 416, 384),
    (4, 24, 200, None),
    (40, 33, 128, 64),
]


@pytest.mark.parametrize("config", [AFTER, BEFORE], ids=["after", "before"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_equal_the_reference(shape: tuple[int, int, int, int | None], config: configs.Config) -> None:
    case = arguments(*shape)
    y = gpu.linear_on(machine(config), **grouped(case))
    assert_is_the_definition(y, case, rounded_weight=config is BEFORE)


def test_scaling_after_the_dot_rounds_no_weight() -> None:
    """One column, so that the sum is one product: float32's product of x, an exact integer and the scale, rounded."""
    case = arguments(2, 40, 1, None, zeros="none")
    y = gpu.linear_on(machine(), **grouped(case))
    codes = layout.unpack(case["words"], 4, 1)[:, 0].float()
    assert torch.equal(y, (case["x"].float() * (codes - 8) * case["scales"][0].float()).half())


@pytest.mark.parametrize("config", [AFTER, BEFORE], ids=["after", "before"])
@pytest.mark.parametrize("zeros", ["none", "0", "15", "16"])
def test_zero_points_at_both_ends(zeros: str, config: configs.Config) -> None:
    case = arguments(2, 33, 160, 32, zeros=zeros)
    assert_is_the_definition(gpu.linear_on(machine(config), **grouped(case)), case, rounded_weight=config is BEFORE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bias_and_column_order(bits: int) -> None:
    case = arguments(3, 33, 160, 32, bits=bits, extras=True)
    assert_is_the_definition(gpu.linear_on(machine(), **grouped(case)), case)


@pytest.mark.parametrize("scale", [torch.float16, torch.float32], ids=str)
def test_scales_of_another_dtype_round_the_weight_once(scale: torch.dtype) -> None:
    case = arguments(3, 33, 160, 32)
    case["scales"] = case["scales"].to(scale) * (1 if scale == torch.float16 else 1 + 2.0**-12)
    assert_is_the_definition(gpu.linear_on(machine(BEFORE), **grouped(case)), case, rounded_weight=True)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("shape", [(3, 33, 300, 32), (17, 7, 256, 64), (1, 20, 272, 128), (2, 9, 200, None)], ids=str)
def test_other_widths_equal_the_reference(shape: tuple[int, int, int, int | None], bits: int) -> None:
    for zeros in ("none", "random"):
        case = arguments(*shape, bits=bits, zeros=zeros)
        assert_is_the_definition(gpu.linear_on(machine(), **grouped(case)), case)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_splits_are_summed_and_counters_reset(splits: int, bits: int) -> None:
    M, N, K = 17, 40, 800  # 2 x 2 output tiles of 7 tiles of columns: all splits have different sizes
    case = arguments(M, N, K, 32, bits=bits, extras=True)
    case["column_order"] = None
    config = configs.Config(16, 32, 4, 2, ctas_per_sm=splits, scale="after")
    weight, x, bias = weight_in(case), case["x"], case["bias"]
    plan = gpu.plan(config, machine(config, processors=4), gpu.Product.of(M, weight, bias))
    assert plan.splits == splits and plan.grid == (2, 2, splits)
    out = torch.full((M, N), torch.nan, dtype=torch.float16)
    workspace, counts = torch.full((splits, M, N), torch.nan), torch.zeros(4, dtype=torch.int32)
    gpu.run_fused(plan, x, weight, bias, out, workspace, counts)
    assert_is_the_definition(out, case)
    assert not counts.any()
    again = torch.full_like(out, torch.nan)
    gpu.run_fused(plan, x, weight, bias, again, workspace.fill_(torch.nan), counts)
    assert torch.equal(again, out)


@pytest.mark.parametrize("group", [32, 96, 128, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_equals_the_rounded_reference(bits: int, group: int | None) -> None:
    case = arguments(1, 45, 300, group, bits=bits)
    out = torch.full((37, 300), torch.nan, dtype=torch.float16)
    gpu.dequantize(weight_in(case), out, 5)
    W = reference.dequantize(weight_in(in_numpy(case)))
    np.testing.assert_array_equal(out.numpy(), W[5:42].astype(np.float16))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("extras", [False, True], ids=["least", "all"])
def test_many_rows_go_through_chunks_of_dequantized_weight(
    extras: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the crossover; 100 rows of W, 16 at a time."""
    monkeypatch.setattr(chunks, "rows_per_chunk", lambda *_: 16)
    case = arguments(9, 100, 200, 32, bits=bits, extras=extras)
    if extras:
        case["bias"] = case["bias"].half()
    rows = case["x"] if case["column_order"] is None else case["x"].index_select(1, case["column_order"])
    out = torch.full((9, 100), torch.nan, dtype=torch.float16)
    with RecordedProducts() as recorded:
        gpu.run_dequantized(machine(), rows, weight_in(case), case["bias"], out)
    assert len(recorded.products) == 7
    assert_is_the_definition(out, case, rounded_weight=True)


@pytest.mark.parametrize(("bits", "M", "chunks"), [(4, 8, 0), (4, 9, 1), (3, 8, 0)])
def test_number_of_rows_selects_the_kernel(bits: int, M: int, chunks: int) -> None:
    case = arguments(M, 24, 160, 32, bits=bits)
    with RecordedProducts() as recorded:
        y = gpu.linear_on(machine(crossover=8), **grouped(case))
    assert len(recorded.products) == chunks
    assert_is_the_definition(y, case, rounded_weight=chunks > 0)


def within(tensor: Tensor, *more: int) -> Tensor:
    """The same values as a view of a larger tensor, with NaN (integers: 99) in `more` rows, columns behind them."""
    shape = [size + extra for size, extra in zip(tensor.shape, more, strict=True)]
    fill = torch.nan if tensor.is_floating_point() else 99
    view = torch.full(shape, fill, dtype=tensor.dtype)[tuple(slice(size) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_kernels_stay_within_the_tensors(bits: int, group: int) -> None:
    """The last group is partial, its tile extends past the last group, and neither M nor N fill a block."""
    M, N, K = 3, 20, 140
    case = arguments(M, N, K, group, bits=bits, extras=True)
    x, bias, out = within(case["x"], 20, 200), within(case["bias"], 50), within(torch.zeros(M, N).half(), 20, 0)
    weight = weight_in(case)._replace(scales=within(case["scales"], 8, 0), zeros=within(case["zeros"], 8, 0))
    gpu.run_fused(gpu.plan(AFTER, machine(), gpu.Product.of(M, weight, bias)), x, weight, bias, out)
    case["column_order"] = None
    assert_is_the_definition(out, case)
    assert out._base is not None and out._base[M:].isnan().all()
    W = within(torch.zeros(15, K, dtype=torch.float16), 40, 0)
    gpu.dequantize(weight, W, 5)
    assert W.isfinite().all() and W._base is not None and W._base[15:].isnan().all()


def test_no_rows_and_no_features() -> None:
    case = arguments(0, 24, 160, 32)
    assert gpu.linear_on(machine(), **grouped(case)).shape == (0, 24)
    case = arguments(2, 0, 160, 32)
    assert gpu.linear_on(machine(), **grouped(case)).shape == (2, 0)


def test_x_of_any_strides_and_leading_shape() -> None:
    case = arguments(6, 24, 160, 32)
    x = case["x"]
    for strided in (
        x.view(2, 3, 160).transpose(0, 1),
        x.t().contiguous().t(),
        torch.cat([x, x], dim=1)[:, :160],  # rows apart
        x[:1].expand(4, 160),
        x[0],
    ):
        case["x"] = strided
        assert_is_the_definition(gpu.linear_on(machine(), **grouped(case)), case)


def test_rows_are_copied_only_where_triton_would_compile_again() -> None:
    wide = torch.randn(4, 400).half()
    for view in (wide[:, :160], wide[:, 16:176], wide[:1, 8:168].expand(3, 160), wide[1:, :400], wide[:1, :1]):
        assert gpu.aligned(view) is view
    for view in (wide[:, 1:161], torch.zeros(3, 168).half()[:, :160], wide[:, 4:5]):
        copied = gpu.aligned(view)
        assert torch.equal(copied, view)
        assert copied.data_ptr() % 16 == 0 and copied.stride() == (view.shape[1], 1)
    assert gpu.aligned(wide.view(-1)[1:161].view(1, 160)).data_ptr() % 16 == 0


def test_x_at_an_odd_address_gives_the_same_bits() -> None:
    case = arguments(6, 24, 160, 32)
    expected = gpu.linear_on(machine(), **grouped(case))
    moved = torch.empty(6 * 160 + 1, dtype=torch.float16)[1:].view(6, 160).copy_(case["x"])
    assert torch.equal(gpu.linear_on(machine(), **grouped({**case, "x": moved})), expected)


@pytest.mark.parametrize("chunk", [1, 1 << 28], ids=["row by row", "at once"])
@pytest.mark.parametrize("extras", [False, True], ids=["least", "all"])
def test_input_gradient_multiplies_in_the_dtype_of_x(extras: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight and each product rounded to float16, and the sum of chunks in float32."""
    monkeypatch.setattr(gpu, "GRADIENT_BYTES", chunk)
    case = arguments(3, 20, 160, 32, extras=extras)
    outgoing = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1)).half()
    with RecordedProducts() as recorded:
        gradient = gpu.input_gradient(outgoing, weight_in(case))
    assert len(recorded.products) == (20 if chunk == 1 else 1)
    W = reference.dequantize(weight_in(in_numpy(case)))
    if extras:
        W = W[:, np.argsort(case["column_order"].numpy())]
    expected, magnitude = outgoing.double().numpy() @ W, np.abs(outgoing.double().numpy()) @ np.abs(W)
    assert gradient.dtype == torch.float16 and gradient.is_contiguous()
    assert np.all(np.abs(gradient.double().numpy() - expected) <= 3 * HALF * magnitude + 2.0**-24)


@pytest.mark.parametrize("lead", [(0, 2), ()])
def test_input_gradient_of_any_leading_shape(lead: tuple[int, ...]) -> None:
    weight = weight_in(arguments(1, 20, 160, 32))
    outgoing = torch.ones(*lead, 20, dtype=torch.float16)
    assert gpu.input_gradient(outgoing, weight).shape == (*lead, 160)
    exact = gpu.input_gradient(outgoing.float(), weight)
    assert torch.equal(exact, cpu.input_gradient(outgoing.float(), weight))


@pytest.mark.parametrize("change", [{"x": torch.float32}, {"group": 16}, {"group": 48}], ids=str)
def test_uncovered_weights_use_torch(change: dict[str, Any]) -> None:
    case = arguments(3, 24, 160, change.get("group", 32))
    case["x"] = case["x"].to(change.get("x", torch.float16))
    assert torch.equal(gpu.linear_on(machine(), **grouped(case)), cpu.linear(**grouped(case)))
    assert not gpu.covers(case["x"].dtype, weight_in(case))


def test_gpu_linear_takes_the_arguments_of_cpu_linear() -> None:
    case = arguments(2, 24, 160, 32, extras=True)
    assert_is_the_definition(gpu.linear(**grouped(case)), case)
