"""Layers that share an input run as one product with the same results."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import BITS, InputScheme, WeightScheme
from llmq.runtime.fused_linear import FusedLinear, fuse_rows, shared_inputs
from llmq.runtime.packed_linear import PackedLinear
from tests.weights import assert_same, random_weight

K = 160
ROWS = {"q": 24, "k": 8, "v": 5}
NAMES = tuple(ROWS)


class Products(TorchDispatchMode):
    """Counts the products with packed weights inside `with`."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "w4a16_linear" in str(function)
        return function(*args, **(kwargs or {}))


class Attention(nn.Module):
    """A module with three layers on the same tensor; `between` is called with it before the last layer."""

    def __init__(self, layers: Sequence[nn.Module], between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = layers
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        query, key = self.q(x), self.k(x)
        if self.between is not None:
            x = self.between(x)
        return torch.cat([query, key, self.v(x)], dim=-1)


def some_weights(bits: int = 4, asymmetric: Sequence[bool] = (False, False, False)) -> list[QuantizedTensor]:
    schemes = [WeightScheme(bits, 32, symmetric=not zeros) for zeros in asymmetric]
    return [random_weight(scheme, N, K, seed=N) for scheme, N in zip(schemes, ROWS.values(), strict=True)]


def pair(
    weights: Sequence[QuantizedTensor] | None = None, *, biases: Sequence[bool] = (False, False, False), **options: Any
) -> tuple[Attention, Attention]:
    """The same layers, separate and fused."""
    weights = some_weights() if weights is None else weights
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(weight.shape[0], generator=generator) for weight in weights]

    def layers() -> list[nn.Module]:
        return [PackedLinear(w, b if has else None) for w, b, has in zip(weights, parts, biases, strict=True)]

    fused = Attention(layers(), **options)
    fuse_rows(fused, NAMES)
    assert all(isinstance(getattr(fused, name), FusedLinear) for name in NAMES)
    return Attention(layers(), **options), fused


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """The order of the sums may differ: K rounding errors relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=K * 2**-23 * float(expected.detach().abs().max()))


# ---- the product


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("asymmetric", [(False, False, False), (True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_one_product_equals_three_products(bits: int, asymmetric: Sequence[bool], biases: Sequence[bool]) -> None:
    apart, fused = pair(some_weights(bits, asymmetric), biases=biases)
    x = inputs(2, 5)
    with Products() as products, torch.no_grad():
        actual = fused(x)
    assert products.count == 1
    assert_near(actual, apart(x))


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, True)], ids=str)
@pytest.mark.parametrize("asymmetric", [(True, True, True), (True, False, False)], ids=str)
def test_each_layer_works_alone(asymmetric: Sequence[bool], biases: Sequence[bool]) -> None:
    apart, fused = pair(some_weights(4, asymmetric), biases=biases)
    for position, name in enumerate(reversed(NAMES)):
        x = inputs(3, seed=position)
        assert_near(getattr(fused, name)(input=x), getattr(apart, name)(x))


def test_each_layer_works_on_a_separate_input() -> None:
    apart, fused = pair(between=lambda x: x + 1)
    x = inputs(3)
    with Products() as products, torch.no_grad():
        actual = fused(x)
    assert products.count == 2  # q and k together
    assert_near(actual, apart(x))


def test_equal_tensor_does_not_use_the_waiting_product() -> None:
    _, fused = pair()
    x = inputs(3)
    fused.q(x)
    with Products() as products:
        fused.k(x.clone())
    assert products.count == 1


def test_modified_input_is_multiplied_again() -> None:
    apart, fused = pair(between=lambda x: x.mul_(2))
    x = inputs(3)
    with torch.no_grad():
        assert_near(fused(x), apart(x))


def test_layer_that_runs_twice_gives_the_same_result() -> None:
    apart, fused = pair()
    x = inputs(3)
    for name in ("q", "k", "k", "q", "v", "v", "q"):
        actual = getattr(fused, name)(x)
        assert_near(actual, getattr(apart, name)(x))
        actual.zero_()  # which the next layer must not see


def test_inference_mode_shares_only_within_itself() -> None:
    apart, fused = pair()
    x = inputs(3)
    with torch.inference_mode(), Products() as products:
        actual = fused(x)
    assert products.count == 1
    assert_near(actual, apart(x))
    with torch.inference_mode():
        fused.q(x)
    with torch.no_grad():
        assert not fused.k(x).is_inference()


# ---- lifetime of the product


def test_product_is_freed_by_its_last_reader() -> None:
    _, fused = pair()
    x = inputs(3)
    alive = weakref.ref(x)
    for name in NAMES:
        getattr(fused, name)(x)
    del x
    gc.collect()
    assert alive() is None


def test_only_one_unused_product_is_kept() -> None:
    _, fused = pair()
    seen = []
    for seed in range(3):
        x = inputs(3, seed=seed)
        fused.q(x)
        fused.v(x)
        seen.append(weakref.ref(x))
        del x
    gc.collect()
    assert [reference() is None for reference in seen] == [True, True, False]


def test_rows_are_stored_once() -> None:
    apart, fused = pair(some_weights(4, (True, True, True)), biases=(True, True, True))
    tensors = [*fused.buffers(), *fused.parameters()]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(held.values()) == sum(tensor.nbytes for tensor in [*apart.buffers(), *apart.parameters()])


# ---- autograd


@pytest.mark.parametrize("again", [None, True, False], ids=["plain", "reentrant", "checkpointed"])
def test_input_gradients_equal_those_of_separate_layers(again: bool | None) -> None:
    apart, fused = pair(biases=(True, False, True))
    weight = torch.randn(3, sum(ROWS.values()), generator=torch.Generator().manual_seed(5))
    gradients = []
    for model in (apart, fused):
        x = inputs(3).requires_grad_()
        y = model(x) if again is None else checkpoint(model, x, use_reentrant=again)
        (y.square() * weight).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert_near(gradients[1], gradients[0])


def test_adapter_on_one_layer_may_add_in_place() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.own = base, nn.Linear(K, ROWS["k"], bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base(x)
            y += self.own(x)
            return y

    actual = []
    for model in pair():
        torch.manual_seed(0)
        model.k = Adapted(model.k)
        x = inputs(3).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        assert x.grad is not None
        actual.append((y.detach(), x.grad, model.k.own.weight.grad))
    for theirs, ours in zip(*actual, strict=True):
        assert_near(ours, theirs)


def test_product_without_gradient_is_not_used_if_one_is_needed() -> None:
    apart, fused = pair()
    x = inputs(3).requires_grad_()
    with torch.no_grad():
        fused.q(x)
    (actual,) = torch.autograd.grad(fused.k(x).sum(), x)
    (expected,) = torch.autograd.grad(apart.k(x).sum(), x)
    assert_near(actual, expected)


# ---- torch.compile


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__
)
def test_compiled_graph_has_one_product(mode: Any) -> None:
    apart, fused = pair(biases=(True, False, True))
    counts = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        counts.append(sum("w4a16_linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    with mode():
        for seed in range(3):
            x = inputs(3, seed=seed)
            assert_near(compiled(x), apart(x))
    assert counts == [1]


def test_compiled_graph_has_correct_gradients() -> None:
    apart, fused = pair()
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (apart, compiled):
        x = inputs(3).requires_grad_()
        model(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert_near(gradients[1], gradients[0])


# ---- copies and files


def test_copy_shares_no_rows_with_the_original() -> None:
    apart, fused = pair()
    x = inputs(3).requires_grad_()
    fused.q(x)  # a product with a gradient is waiting, which cannot be copied
    twin = copy.deepcopy(fused)
    assert twin.q.stack is twin.v.stack
    assert twin.q.stack is not fused.q.stack
    twin.q.stack.rows.scales.zero_()
    assert float(twin(x).detach().abs().max()) == 0
    assert_near(fused(x), apart(x))


def test_module_can_be_saved_and_loaded() -> None:
    apart, fused = pair()
    x = inputs(3).requires_grad_()
    fused.q(x)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert_near(torch.load(file, weights_only=False)(x), apart(x))


def test_state_dict_fits_an_equal_module() -> None:
    apart, fused = pair()
    _, other = pair([random_weight(WeightScheme(4, 32), N, K, seed=N + 100) for N in ROWS.values()])
    state = fused.state_dict()
    assert {key.partition(".")[2] for key in state} == {"stack.rows.words", "stack.rows.scales"}
    assert len({tensor.data_ptr() for tensor in state.values()}) == 2
    other.load_state_dict(state)
    x = inputs(3)
    assert_near(other(x), apart(x))


def test_stack_moves_as_one() -> None:
    _, fused = pair()
    moved = fused.to("meta")
    assert moved.q.stack.rows is moved.v.stack.rows
    with Products() as products:
        actual = moved(torch.empty(2, 3, K, device="meta"))
    assert actual.shape == (2, 3, sum(ROWS.values()))
    assert products.count == 1


# ---- reading weights back


@st.composite
def groups_of_weights(draw: st.DrawFn) -> list[QuantizedTensor]:
    bits, shuffled = draw(st.sampled_from(BITS)), draw(st.booleans())
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    weights = []
    for seed in range(draw(st.integers(2, 4))):
        scheme = WeightScheme(bits, 32, symmetric=draw(st.booleans()))
        weight = random_weight(scheme, draw(st.integers(1, 20)), K, scale_dtype=dtype, shuffled=shuffled, seed=seed)
        index = weights[0].group_index if weights else weight.group_index
        weights.append(QuantizedTensor(weight.codes, weight.scales, weight.zeros, scheme, index))
    return weights


@given(weights=groups_of_weights())
@settings(max_examples=60)
def test_every_weight_is_restored_exactly(weights: list[QuantizedTensor]) -> None:
    model = nn.ModuleList(PackedLinear(weight, None) for weight in weights)
    fuse_rows(model, [str(position) for position in range(len(weights))])
    for layer, weight in zip(model, weights, strict=True):
        assert isinstance(layer, FusedLinear)
        assert_same(layer.quantized(), weight)


def test_explicit_zero_points_are_restored() -> None:
    weights = some_weights()
    scheme = weights[1].scheme
    zeros = torch.full(weights[1].scales.shape, scheme.middle, dtype=torch.int16)
    weights[1] = QuantizedTensor(weights[1].codes, weights[1].scales, zeros, scheme)
    _, fused = pair(weights)
    for name, weight in zip(NAMES, weights, strict=True):
        assert_same(getattr(fused, name).quantized(), weight)


OTHERS = {
    "bits": random_weight(WeightScheme(8, 32), 8, K),
    "group size": random_weight(WeightScheme(4, 16), 8, K),
    "dtype of scales": random_weight(WeightScheme(4, 32), 8, K, scale_dtype=torch.float16),
    "order of columns": random_weight(WeightScheme(4, 32), 8, K, shuffled=True),
}


@pytest.mark.parametrize("odd", OTHERS.values(), ids=OTHERS)
def test_different_grids_are_not_fused(odd: QuantizedTensor) -> None:
    weights = some_weights()
    model = Attention([PackedLinear(weight, None) for weight in (weights[0], odd, weights[2])])
    apart = copy.deepcopy(model)
    fuse_rows(model, NAMES)
    assert isinstance(model.k, PackedLinear)
    assert isinstance(model.q, FusedLinear)
    assert model.q.stack is model.v.stack
    x = inputs(3)
    assert_near(model(x), apart(x))


def test_different_column_orders_are_not_fused() -> None:
    weights = [random_weight(WeightScheme(4, 32), 8, K, shuffled=True, seed=seed) for seed in range(3)]
    model = Attention([PackedLinear(weight, None) for weight in weights])
    fuse_rows(model, NAMES)
    assert all(isinstance(layer, PackedLinear) for layer in model.children())


def test_repr_describes_the_layer() -> None:
    _, fused = pair()
    assert "in_features=160, out_features=8, int4 g32 symmetric, rows 24 to 32" in repr(fused.k)


# ---- which layers share an input


class Language(nn.Module):
    """A model whose block calls its layers as the test specifies."""

    def __init__(self, block: Callable[["Language", Tensor], Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedding = nn.Embedding(7, K)
            for name in (*NAMES, "o"):
                self.add_module(name, nn.Linear(K, K, bias=False))
        self.register_buffer("scale", torch.ones(K))  # not on meta, like buffers of transformers
        self.block = block

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self.block(self, self.embedding(input_ids) * self.scale)


def groups(block: Callable[[Any, Tensor], Tensor], paths: Sequence[str] = (*NAMES, "o")) -> list[list[str]]:
    return shared_inputs(Language(block), paths)


def test_layers_on_one_tensor_are_a_group_in_order() -> None:
    assert groups(lambda m, x: m.o(m.v(x) + m.q(x) * m.k(x))) == [["v", "q", "k"]]


def test_only_requested_layers_are_grouped() -> None:
    assert groups(lambda m, x: m.v(x) + m.q(x) * m.k(x), ["q", "v"]) == [["v", "q"]]


def test_modified_tensor_counts_as_another() -> None:
    assert groups(lambda m, x: m.q(x) + m.k(x.add_(1)) + m.v(x)) == [["k", "v"]]


def test_layer_in_between_ends_a_group() -> None:
    """Its input depends on the first layers, whose product would wait for long."""
    assert groups(lambda m, x: m.q(x) + m.o(m.k(x)) + m.v(x)) == [["q", "k"]]


def test_repeated_layer_keeps_its_first_place() -> None:
    assert groups(lambda m, x: m.q(x) + m.k(x) + m.q(x + 1) + m.v(x)) == [["q", "k", "v"]]


def test_layers_with_contiguous_outputs_are_not_grouped() -> None:
    assert groups(lambda m, x: m.q(x).view(-1) + m.k(x).view(-1)) == []


class Values(nn.Module):
    """A module whose computation depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_module_that_needs_values_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    model = Language(lambda m, x: m.o(m.values(m.v(x) + m.q(x) * m.k(x))))
    model.values = Values()
    assert shared_inputs(model, (*NAMES, "o")) == [["v", "q", "k"]]
    assert caplog.messages == []
    assert float(model.values(torch.ones(2)).sum()) == 2  # its forward is restored


def test_model_that_fails_on_meta_is_not_fused_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    def block(model: Any, x: Tensor) -> Tensor:
        return model.q(x) + model.k(x) if float(x.sum()) > 0 else x

    assert groups(block) == []
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("4 of 4 layers are not fused: Language does not run on the meta device (")


def test_model_is_not_changed() -> None:
    model = Language(lambda m, x: m.q(x) + m.k(x))
    before = {name: vars(module).keys() for name, module in model.named_modules()}
    assert shared_inputs(model, NAMES) == [["q", "k"]]
    assert {name: vars(module).keys() for name, module in model.named_modules()} == before
    assert model.scale.equal(torch.ones(K))
    assert all(not module._forward_hooks for module in model.modules())


def test_layers_with_other_inputs_are_not_fused_and_fused_ones_round_them() -> None:
    dynamic = InputScheme("int8", "dynamic")
    weights = [random_weight(WeightScheme(8, "channel"), 16, 64, seed=seed) for seed in range(3)]
    layers = [PackedLinear(w, None, inputs=i) for w, i in zip(weights, (dynamic, dynamic, None), strict=True)]
    model, x = nn.ModuleList(layers), torch.randn(2, 64)
    expected = [layer(x) for layer in layers]
    fuse_rows(model, ["0", "1", "2"])
    assert [type(layer) for layer in model] == [FusedLinear, FusedLinear, PackedLinear]
    assert all(torch.equal(layer(x), before) for layer, before in zip(model, expected, strict=True))
    assert torch.equal(model[1](x + 1), layers[1](x + 1))  # alone
