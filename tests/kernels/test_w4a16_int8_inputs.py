"""Integer products for inputs in int8 on a CPU: exact sums, and when they are used."""

from collections.abc import Iterator

import pytest
import torch

from llmq_kernels.w4a16 import int8_inputs, layout, small_batches
from llmq_kernels.w4a16.packed_weight import PackedWeight


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(small_batches.VARIABLE, "on")
    if not int8_inputs.choose().rows:
        pytest.skip(int8_inputs.describe())
    yield
    int8_inputs._choose.cache_clear()


def made(N: int, K: int, group: int, bits: int) -> tuple[PackedWeight[torch.Tensor], torch.Tensor]:
    """A weight, and its codes (N, K) less the middle as float64."""
    generator = torch.Generator().manual_seed(N + K)
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    scales = torch.randn(-(-K // group), N, generator=generator)
    weight = PackedWeight(layout.pack(codes, bits), scales, None, bits, K, group)
    return weight, codes.to(torch.float64) - (1 << bits - 1)


@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize(("N", "K", "group"), [(48, 256, 64), (5, 96, 32), (33, 1000, 1000), (16, 7, 7)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_product_has_exact_sums(bits: int, N: int, K: int, group: int, rows: int) -> None:
    weight, centred = made(N, K, group, bits)
    pair = int8_inputs.prepare(weight)
    assert pair is not None and pair[0].dtype == torch.int8
    values = torch.randint(-128, 128, (rows, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    values[0] = -128
    computed = int8_inputs.linear(values, *pair, None)
    by_group = values.double().view(rows, -1, group).transpose(0, 1) @ centred.view(N, -1, group).permute(1, 2, 0)
    terms = by_group * weight.scales.double()[:, None]
    assert bool(((computed - terms.sum(0)).abs() <= len(terms) * 2.0**-23 * terms.abs().sum(0)).all())


def test_columns_are_taken_in_their_order() -> None:
    weight, _ = made(16, 64, 32, 4)
    pair, order = int8_inputs.prepare(weight), torch.arange(63, -1, -1)
    assert pair is not None
    values = torch.arange(64, dtype=torch.int8)[None]
    assert torch.equal(int8_inputs.linear(values, *pair, order), int8_inputs.linear(values.flip(1), *pair, None))


def test_what_integers_do_not_serve_has_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = made(16, 64, 32, 4)
    assert int8_inputs.prepare(weight._replace(zeros=torch.zeros(2, 16, dtype=torch.int16))) is None
    partial_group, _ = made(16, 72, 32, 4)
    assert int8_inputs.prepare(partial_group) is None
    monkeypatch.setenv(small_batches.VARIABLE, "off")
    assert int8_inputs.prepare(weight) is None
    assert int8_inputs.describe() == "integer products for int8 inputs on CPU: not used (LLMQ_CPU_INT4=off)"


def test_a_processor_with_wrong_or_slow_sums_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_inputs, "_exact", lambda: False)
    int8_inputs._choose.cache_clear()
    assert "extreme values are wrong" in int8_inputs.describe()
    monkeypatch.undo()
    monkeypatch.setenv(small_batches.VARIABLE, "auto")
    monkeypatch.setattr(int8_inputs, "best_seconds", lambda *calls: [1.0, 1.1])
    int8_inputs._choose.cache_clear()
    assert int8_inputs.choose().rows == 0 and "1.1 and 1.1 times as fast" in int8_inputs.choose().reason
