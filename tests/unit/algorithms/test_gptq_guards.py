"""Other guarantees of GPTQ: damping, zero columns, stacked weights, and never worse than nearest codes."""

import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, clip, gptq, output_error, rtn
from llmq.algorithms.factor import factorize
from llmq.numerics import affine_grid
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import BITS, WeightScheme

CPU = torch.device("cpu")
G16 = WeightScheme(4, 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(X: Tensor) -> InputStats:
    stats = InputStats(X.shape[1], CPU)
    stats.update(X)
    return stats


def inputs(T: int = 256, K: int = 64, seed: int = 1) -> Tensor:
    """(T, K) correlated, with channels of different sizes."""
    return random(T, K, seed=seed) @ random(K, K, seed=seed + 1) * torch.linspace(0.2, 3, K)


def with_hessian(hessian: Tensor) -> InputStats:
    """Statistics of one token with the given `hessian`, which real inputs may never give."""
    stats = InputStats(len(hessian), CPU)
    stats.tokens = 1
    stats._gram.copy_(hessian)
    return stats


def indefinite(lowest: float, K: int = 32) -> Tensor:
    """(K, K) with a mean diagonal of 1 and the smallest eigenvalue `lowest`."""
    values = torch.full((K,), (K - lowest) / (K - 1), dtype=torch.float64)
    values[0] = lowest
    basis, _ = torch.linalg.qr(random(K, K).double())
    hessian: Tensor = (basis * values) @ basis.T
    return hessian.float()


# ---- damping


@pytest.mark.parametrize(
    ("lowest", "first", "needed"),
    [(0.0, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.005, 0.001, 0.01), (-0.05, 0.03, 0.1), (-0.2, 0.3, 0.3)],
)
def test_damping_grows_until_the_hessian_can_be_factored(lowest: float, first: float, needed: float) -> None:
    rounding = gptq.round_weight(random(4, 32), with_hessian(indefinite(lowest)), G16, Options(damping=first))
    assert rounding.damping == pytest.approx(needed, rel=1e-9)
    assert (f"damping raised to {needed:g}" in rounding.notes) == (needed != first)


def test_the_reported_damping_is_the_damping_used() -> None:
    """It is not the sum over all attempts."""
    stats = with_hessian(indefinite(-0.05))
    raised, direct = (factorize(stats.second_moment(), "activation", first) for first in (0.01, 0.1))
    assert raised is not None and direct is not None
    torch.testing.assert_close(raised.price, direct.price, rtol=2**-22, atol=0)
    torch.testing.assert_close(raised.upper, direct.upper, rtol=2**-22, atol=1e-12)


@pytest.mark.parametrize(("first", "tried"), [(0.01, "0.1"), (0.04, "0.1"), (0.3, "0.3")])
def test_an_unfactorable_hessian_falls_back_to_clipping(first: float, tried: str) -> None:
    weight, stats = random(4, 32), with_hessian(indefinite(-0.5))
    rounding = gptq.round_weight(weight, stats, G16, Options(damping=first))
    clipped = clip.round_weight(weight, stats, G16, Options())
    assert rounding.damping is None
    assert len(rounding.notes) == 1 and rounding.notes[0].endswith(
        f"cannot be factored, even with a damping of {tried}"
    )
    assert torch.equal(rounding.quantized.codes, clipped.quantized.codes)
    assert torch.equal(rounding.quantized.scales, clipped.quantized.scales)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_zero_or_overflowed_inputs_fall_back_to_rtn(value: float) -> None:
    weight, stats = random(4, 32), with_hessian(torch.full((32, 32), value))
    rounding = gptq.round_weight(weight, stats, G16, Options())
    plain = rtn.round_weight(weight, None, G16, Options())
    assert rounding.damping is None and "cannot be factored" in rounding.notes[0]
    assert torch.equal(rounding.quantized.dequantize(), plain.quantized.dequantize())


def test_statistics_without_tokens_raise_an_error() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        gptq.round_weight(random(4, 32), InputStats(32, CPU), G16, Options())
    with pytest.raises(ValueError, match="at least one token"):
        gptq.round_weight(random(4, 32), None, G16, Options())


# ---- columns whose input was always zero

ZERO_COLUMNS = torch.tensor([0, 7, 8, 30, 63])


def with_zero_columns() -> InputStats:
    X = inputs()
    X[:, ZERO_COLUMNS] = 0
    return statistics(X)


@pytest.mark.parametrize(
    ("order", "scales"), [("activation", "searched"), ("natural", "searched"), ("natural", "minmax")]
)
def test_a_zero_column_keeps_its_nearest_codes(order: str, scales: str) -> None:
    weight = random(8, 64)
    q = gptq.round_weight(weight, with_zero_columns(), G16, Options(order=order, scales=scales)).quantized
    nearest = affine_grid.Grid(G16, q.scales, q.zeros).encode(weight)
    assert torch.equal(q.codes[:, ZERO_COLUMNS], nearest[:, ZERO_COLUMNS])
    assert not torch.equal(q.codes, nearest)  # the others were compensated for


@pytest.mark.parametrize("order", ["activation", "natural"])
def test_a_zero_column_does_not_change_the_others(order: str) -> None:
    """On a fixed grid, the others get the same codes without it."""
    weight, stats = random(8, 64), with_zero_columns()
    factor = factorize(stats.second_moment(), order, 0.01)
    assert factor is not None
    chosen = affine_grid.fit_minmax(weight, WeightScheme(4, "channel"), torch.float32)
    codes, _ = gptq.compensate(weight, factor, chosen)
    used = torch.tensor([k for k in range(64) if k not in ZERO_COLUMNS])
    same_damping = Options(order=order, damping=0.01 * len(used) / 64)  # a fraction of another mean
    alone = factorize(stats.second_moment()[used][:, used], same_damping.order, same_damping.damping)
    assert alone is not None
    assert torch.equal(gptq.compensate(weight[:, used], alone, chosen)[0], codes[:, used])


def test_the_price_of_a_zero_column_is_the_damping() -> None:
    """With the mean price, zero columns would dominate the search for scales: compensation lowers the other prices."""
    stats = with_zero_columns()
    factor = factorize(stats.second_moment(), "activation", 0.01)
    assert factor is not None
    expected = 0.01 * stats.mean_square.mean().expand(len(ZERO_COLUMNS))
    torch.testing.assert_close(factor.price[ZERO_COLUMNS], expected, rtol=2**-20, atol=0)
    assert float(factor.price.min()) == pytest.approx(float(expected[0]), rel=2**-20)


# ---- rows


@pytest.mark.parametrize(
    "scheme", [WeightScheme(4, 16), WeightScheme(3, 32, symmetric=False), WeightScheme(4, "channel")], ids=str
)
@pytest.mark.parametrize(("order", "scales"), [("activation", "searched"), ("natural", "minmax")])
def test_stacking_weights_does_not_change_their_codes(scheme: WeightScheme, order: str, scales: str) -> None:
    """Within one block of columns all arithmetic is element-wise, so the bits must be equal."""
    stats, parts = statistics(inputs()), [random(rows, 64, seed=rows) for rows in (8, 4, 5)]
    options = Options(order=order, scales=scales)
    together = gptq.round_weight(torch.cat(parts), stats, scheme, options)
    start = 0
    for part in parts:
        alone, rows = gptq.round_weight(part, stats, scheme, options), together.rows(start, start + len(part))
        start += len(part)
        assert torch.equal(rows.quantized.codes, alone.quantized.codes)
        assert torch.equal(rows.quantized.scales, alone.quantized.scales)
        assert torch.equal(rows.quantized.dequantize(), alone.quantized.dequantize())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grouping", [16, "channel", "tensor"])
@pytest.mark.parametrize(
    ("order", "scales"), [("activation", "searched"), ("natural", "searched"), ("natural", "minmax")]
)
def test_no_row_is_worse_than_its_nearest_codes(bits: int, grouping: int | str, order: str, scales: str) -> None:
    weight, stats = random(48, 32), statistics(inputs(K=32) + 4)
    scheme = WeightScheme(bits, grouping, symmetric=False)  # type: ignore[arg-type]
    q = gptq.round_weight(weight, stats, scheme, Options(order=order, scales=scales)).quantized
    nearest = affine_grid.Grid(scheme, q.scales, q.zeros).quantized(
        affine_grid.Grid(scheme, q.scales, q.zeros).encode(weight)
    )
    H = stats.second_moment().double()
    loss, nearest_loss = (output_error(weight.double(), r.dequantize().double(), H) for r in (q, nearest))
    # The choice is made in float32: K² products, each with a rounding error, of differences that cancel.
    size = (weight.double() - nearest.dequantize()).square().sum(1) * torch.linalg.eigvalsh(H)[-1]
    assert bool((loss <= nearest_loss + 32 * 2.0**-23 * size).all())
    assert float(loss.sum()) < float(nearest_loss.sum())


def test_a_row_made_worse_is_rounded_to_nearest_and_reported() -> None:
    """Inputs with a large common part and four levels: a weight at the end of its range cannot compensate."""
    weight, stats = random(64, 16, seed=3), statistics(random(64, 16) + 10)
    scheme = WeightScheme(2, 16)
    rounding = gptq.round_weight(weight, stats, scheme, Options())
    assert "some rows rounded to nearest, because compensation made them worse" in rounding.notes
    factor = factorize(stats.second_moment(), "activation", 0.01)
    assert factor is not None
    chosen = affine_grid.fit_searched(weight, scheme, torch.float32, factor.price)
    (raw, _), nearest = gptq.compensate(weight, factor, chosen), chosen.encode(weight)
    loss = {name: output_error(weight, chosen.quantized(codes).dequantize(), stats.second_moment())
            for name, codes in (("raw", raw), ("nearest", nearest))}  # fmt: skip
    worse = loss["raw"] > loss["nearest"]
    assert 0 < int(worse.sum()) < 64
    assert torch.equal(rounding.quantized.codes[worse], nearest[worse])
    assert torch.equal(rounding.quantized.codes[~worse], raw[~worse])


def test_compensation_lowers_the_output_error() -> None:
    weight, stats = random(16, 64), statistics(inputs())
    error = {}
    for name, stage in (("rtn", rtn), ("clip", clip), ("gptq", gptq)):
        rounded = stage.round_weight(weight, stats, G16, Options()).quantized.dequantize()
        error[name] = float(output_error(weight, rounded, stats.second_moment()).sum())
    assert error["gptq"] < 0.7 * error["clip"] < 0.7 * error["rtn"]


def test_repeated_calls_give_the_same_bits() -> None:
    weight, stats = random(8, 64), statistics(inputs())
    before, hessian = weight.clone(), stats.second_moment().clone()
    for options in (Options(), Options(order="natural", scales="minmax")):
        first, second = (gptq.round_weight(weight, stats, G16, options).quantized for _ in range(2))
        assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)
    assert torch.equal(weight, before) and torch.equal(stats.second_moment(), hessian)


@pytest.mark.parametrize(
    ("order", "scales"), [("activation", "searched"), ("natural", "searched"), ("natural", "minmax")]
)
def test_the_reported_loss_is_the_output_error(order: str, scales: str) -> None:
    """It comes from the errors of the loop, without a product; with rows rounded to nearest and damping."""
    weight, stats = random(64, 160, seed=3), statistics(random(400, 160) + 2)
    rounding = gptq.round_weight(weight, stats, WeightScheme(2, 16), Options(order=order, scales=scales))
    expected = output_error(weight, rounding.quantized.dequantize(), stats.second_moment())
    assert rounding.loss is not None
    torch.testing.assert_close(rounding.loss, expected, rtol=1e-4, atol=0)
    assert torch.equal(rounding.rows(3, 9).loss, rounding.loss[3:9])  # type: ignore[arg-type]
