"""`PackedLinear` compared with plain matrix products: the same weight and the same outputs."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import FormatError
from llmq.numerics.fake_quantize import rounding_for
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, GroupSize, InputScheme, WeightScheme
from llmq.runtime.packed_linear import PackedLinear
from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import int8_inputs, op, small_batches
from tests.weights import assert_same, random_weight

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def weights(draw: st.DrawFn) -> QuantizedTensor:
    bits, symmetric = draw(st.sampled_from(BITS)), draw(st.booleans())
    group_size: GroupSize = draw(st.sampled_from((16, 32, 64, 128, "channel")))
    groups = draw(st.integers(1, 4))
    K = draw(st.integers(1, 200)) if group_size == "channel" else int(group_size) * groups
    return random_weight(
        WeightScheme(bits, group_size, symmetric),
        draw(st.integers(1, 40)),
        K,
        scale_dtype=draw(st.sampled_from(SCALE_DTYPES)),
        shuffled=draw(st.booleans()) and group_size != "channel" and groups > 1,
        seed=draw(st.integers(0, 1000)),
    )


@given(weight=weights())
@settings(max_examples=120)
def test_weight_is_restored_exactly(weight: QuantizedTensor) -> None:
    assert_same(PackedLinear(weight, None).quantized(), weight)


def rounding_of_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """How much two float32 sums of the same K products may differ, elementwise.

    Each of the two is within K u Σ|x||w| of the exact sum, u = 2**-24 (Higham 2002, equation 3.5); one more u for
    the product with the scale, whose rounding depends on the order of operations.
    """
    K, unit = x.shape[-1], 2.0**-24
    magnitude = x.abs().double() @ weight.abs().double().T
    if bias is not None:
        magnitude = magnitude + bias.abs().double()
    return 2 * (K + 3) * unit * magnitude


@pytest.mark.parametrize("shuffled", [False, True], ids=["plain", "g_idx"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_forward_is_the_product_with_the_dequantized_weight(bits: int, symmetric: bool, shuffled: bool) -> None:
    weight = random_weight(WeightScheme(bits, 32, symmetric), 24, 160, shuffled=shuffled)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 5, 160, generator=torch.Generator().manual_seed(1))
    actual = PackedLinear(weight, bias)(x)
    dense = weight.dequantize()
    expected = x.double() @ dense.double().T + bias.double()
    assert actual.dtype == torch.float32
    assert actual.shape == (2, 5, 24)
    assert bool(((actual.double() - expected).abs() <= rounding_of_product(x, dense, bias)).all())


def test_column_order_matters_to_the_product() -> None:
    """Checks the test above: without the group index the product is far off."""
    weight = random_weight(WeightScheme(4, 32), 24, 160, shuffled=True)
    plain = QuantizedTensor(weight.codes, weight.scales, weight.zeros, weight.scheme)
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    assert float((PackedLinear(weight, None)(x) - PackedLinear(plain, None)(x)).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    weight = random_weight(WeightScheme(4, 32), 24, 160)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = PackedLinear(weight, None)(x)
    dense = weight.dequantize()
    exact = x.double() @ dense.double().T
    half_step = exact.abs() * torch.finfo(dtype).eps / 2
    assert actual.dtype == dtype
    bound = rounding_of_product(x.float(), dense, None)
    assert bool(((actual.double() - exact).abs() <= half_step * (1 + 2**-10) + bound).all())


def test_layer_holds_no_float_copy_of_the_weight() -> None:
    weight = random_weight(WeightScheme(3, 64, symmetric=False), 32, 256, scale_dtype=torch.float16)
    layer = PackedLinear(weight, None)
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert (
        held == 32 * 256 * 3 // 8 + 2 * 32 * 4 + 2 * 32 * 4
    )  # values, float16 scales, int16 zero points of 4 groups per row
    assert [name for name, _ in layer.named_parameters()] == []


def test_group_index_in_plain_order_needs_no_column_order() -> None:
    index = torch.arange(128, dtype=torch.int32) // 32
    weight = random_weight(WeightScheme(4, 32), 8, 128)
    layer = PackedLinear(QuantizedTensor(weight.codes, weight.scales, None, weight.scheme, index), None)
    assert layer.column_order is None
    assert layer.quantized().dequantize().equal(weight.dequantize())


def test_groups_of_unequal_size_are_refused() -> None:
    index = torch.arange(64, dtype=torch.int32) // 32
    index[0] = 1
    weight = random_weight(WeightScheme(4, 32), 8, 64)
    with pytest.raises(FormatError, match="assign 32 columns"):
        PackedLinear(QuantizedTensor(weight.codes, weight.scales, None, weight.scheme, index), None)


def test_repr_describes_the_layer() -> None:
    layer = PackedLinear(random_weight(WeightScheme(3, 32, symmetric=False), 8, 64), None)
    assert "in_features=64, out_features=8, int3 g32 asymmetric" in repr(layer)


@pytest.fixture
def with_pair(monkeypatch: pytest.MonkeyPatch) -> PackedLinear:
    """A layer with a second copy for the int4 product of torch."""
    monkeypatch.setenv(small_batches.VARIABLE, "on")
    if not small_batches.choose(4).rows:
        pytest.skip(small_batches.describe(4))
    layer = PackedLinear(random_weight(WeightScheme(4, 32), 32, 128, scale_dtype=torch.float16), None)
    assert layer.cpu_words is None, "made on demand"
    layer.prepare()
    assert layer.cpu_words is not None
    return layer


def test_small_batches_run_in_bfloat16_and_large_exactly(with_pair: PackedLinear) -> None:
    x = torch.randn(17, 128, generator=torch.Generator().manual_seed(1))
    dense = with_pair.quantized().dequantize()
    exact = x.double() @ dense.double().T
    few, many = with_pair(x[:1]).double(), with_pair(x).double()
    assert bool(((many - exact).abs() <= rounding_of_product(x, dense, None)).all())
    difference = float((few - exact[:1]).norm() / exact[:1].norm())
    assert 2.0**-12 < difference < 3 * 2.0**-8  # roundings of x, scale and y in bfloat16


def test_int4_copy_is_never_saved(with_pair: PackedLinear) -> None:
    assert set(with_pair.state_dict()) == {"words", "scales"}
    written = io.BytesIO()
    torch.save(with_pair, written)
    held = sum(tensor.nbytes for tensor in with_pair.state_dict().values())
    with_pair.cpu_words = with_pair.cpu_grid = None
    without = io.BytesIO()
    torch.save(with_pair, without)
    assert written.tell() == without.tell() > held


def test_copied_layer_has_a_separate_int4_copy(with_pair: PackedLinear) -> None:
    copied = copy.deepcopy(with_pair)
    assert copied.cpu_words is not None and with_pair.cpu_words is not None
    assert copied.cpu_words.equal(with_pair.cpu_words)
    assert copied.cpu_words.data_ptr() != with_pair.cpu_words.data_ptr()


def test_other_devices_have_no_int4_copy(with_pair: PackedLinear) -> None:
    assert copy.deepcopy(with_pair).to("meta").cpu_words is None


def test_moving_to_the_same_device_keeps_the_int4_copy(with_pair: PackedLinear) -> None:
    before = with_pair.cpu_words
    assert with_pair.to("cpu").cpu_words is before


def test_cast_keeps_the_dtype_of_the_int4_copy(with_pair: PackedLinear) -> None:
    layer = with_pair.double().to(torch.float32)
    assert layer.cpu_grid is not None
    assert layer.cpu_grid.dtype == torch.bfloat16
    assert layer(torch.ones(1, 128)).shape == (1, 32)


def test_loading_other_weights_makes_another_int4_copy(with_pair: PackedLinear) -> None:
    other = PackedLinear(random_weight(WeightScheme(4, 32), 32, 128, scale_dtype=torch.float16, seed=5), None)
    with_pair.load_state_dict(other.state_dict())
    other.prepare()
    assert with_pair.cpu_words is not None and other.cpu_words is not None
    assert with_pair.cpu_words.equal(other.cpu_words)


@pytest.mark.parametrize("inputs", [InputScheme("int8", "dynamic"), InputScheme("int8", "static", 0.05)], ids=str)
def test_quantized_inputs_are_rounded_first(inputs: InputScheme) -> None:
    weight = random_weight(WeightScheme(8, "channel"), 24, 64)
    layer, x = PackedLinear(weight, None, inputs=inputs), torch.randn(3, 5, 64)
    assert torch.equal(layer(x), PackedLinear(weight, None)(rounding_for(inputs)(x)))
    assert f"inputs {inputs}" in repr(layer)
    copied = copy.deepcopy(layer)
    assert copied.inputs == inputs and torch.equal(copied(x), layer(x))


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer products, where torch has exact ones."""
    monkeypatch.setenv(small_batches.VARIABLE, "on")
    if not int8_inputs.choose().rows:
        pytest.skip(int8_inputs.describe())


@pytest.mark.usefixtures("integers")
@pytest.mark.parametrize("scheme", [WeightScheme(8, "channel"), WeightScheme(4, 32)], ids=str)
@pytest.mark.parametrize("inputs", [InputScheme("int8", "dynamic"), InputScheme("int8", "static", 0.05)], ids=str)
def test_integers_compute_the_product_of_rounded_inputs(
    scheme: WeightScheme, inputs: InputScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = random_weight(scheme, 24, 64), torch.randn(24)
    floats, layer = (PackedLinear(weight, bias, inputs=inputs) for _ in range(2))
    layer.prepare()
    assert layer.cpu_words is not None and layer.cpu_words.dtype == torch.int8
    x = torch.randn(3, 5, 64)
    assert (layer(input=x) - floats(x)).abs().max() < 1e-5 * floats(x).abs().max()
    broken = torch.zeros(1, 64).index_fill(1, torch.tensor([3]), float("nan"))
    assert bool(layer(broken).isnan().all())
    monkeypatch.setattr(op, "is_plain_inference", lambda x, bias: False)  # gradients and tracing need floats
    assert torch.equal(layer(x), floats(x))


@pytest.mark.usefixtures("integers")
def test_integers_take_the_same_inputs_as_floats() -> None:
    weight, x = random_weight(WeightScheme(4, 32), 24, 64), torch.randn(3, 5, 64)
    floats, layer = (PackedLinear(weight, None, inputs=InputScheme()) for _ in range(2))
    layer.prepare()
    other_strides = x.transpose(0, 1)
    assert torch.equal(layer(other_strides), layer(other_strides.contiguous()))
    for wrong in (torch.randn(3, 128), x.double()):  # 128 is a multiple of K
        with pytest.raises(KernelInputError, match="expected torch.float16"):
            layer(wrong)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == floats(x).dtype == torch.bfloat16


def test_fp8_inputs_have_no_product_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(small_batches.VARIABLE, "on")
    layer = PackedLinear(random_weight(WeightScheme(4, 128), 32, 128), None, inputs=InputScheme("fp8", "dynamic"))
    layer.prepare()
    assert layer.cpu_words is None
