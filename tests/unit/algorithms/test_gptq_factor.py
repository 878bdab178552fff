"""The factorisation works in place and by strips: the numbers are the same, without a second copy or extra syncs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmq.algorithms import Options, gptq
from llmq.algorithms.factor import factorize
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(K: int) -> InputStats:
    stats = InputStats(K, torch.device("cpu"))
    stats.update(random(3 * K, K) @ random(K, K, seed=1) * torch.linspace(0.2, 3, K))
    return stats


def in_one_piece(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U and 1 / the diagonal of the inverse, in visiting order, with a copy for every step."""
    H = hessian.double()[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=torch.float64), upper=True)
    return U, 1 / U.square().sum(0)


@pytest.mark.parametrize(("K", "strip"), [(64, 1024), (65, 16), (64, 63), (9, 1), (1, 4)])
@pytest.mark.parametrize("order", ["activation", "natural"])
def test_strips_change_nothing(K: int, strip: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.algorithms.factor.STRIP", strip)
    monkeypatch.setattr("llmq.algorithms.factor.ELEMENTS_AT_ONCE", 100)
    hessian = statistics(K).second_moment()
    factor = factorize(hessian, order, 0.01)
    assert factor is not None
    upper, price = in_one_piece(hessian, factor.order, 0.01)
    # Both are float64 and then rounded to float32, where they may differ by one unit in the last place.
    size = upper.abs().amax(1, keepdim=True)
    assert bool(((factor.upper - upper).abs() <= 2.0**-23 * size).all())
    np.testing.assert_allclose(factor.price[factor.order], price, rtol=2.0**-22)
    assert not bool(factor.upper.tril(-1).any())


def test_one_strip_gives_the_same_bits_as_one_piece() -> None:
    hessian = statistics(200).second_moment()
    factor = factorize(hessian, "activation", 0.01)
    assert factor is not None
    upper, price = in_one_piece(hessian, factor.order, 0.01)
    assert torch.equal(factor.upper, upper.float())
    assert torch.equal(factor.price[factor.order], price.float())


class Recorder(TorchDispatchMode):
    """Counts the transfers of values to the host, and the elements of new float64 arrays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.transfers = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.transfers += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return result


def test_only_one_array_is_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.algorithms.factor.STRIP", 16)
    monkeypatch.setattr("llmq.algorithms.factor.ELEMENTS_AT_ONCE", 256)
    K, hessian = 128, statistics(128).second_moment()
    with Recorder() as recorder:
        factorize(hessian, "activation", 0.01)
    assert [size for size in recorder.storages.values() if size >= K * K] == [K * K]


@pytest.mark.parametrize(("order", "scales"), [("activation", "searched"), ("natural", "minmax")])
def test_gptq_waits_for_the_device_three_times(order: str, scales: str) -> None:
    """For the mean of H, for the success of the factorisation, and for the rows made worse; never inside the loop."""
    weight, stats = random(8, 160), statistics(160)
    with Recorder() as recorder:
        gptq.round_weight(weight, stats, WeightScheme(4, 16), Options(order=order, scales=scales))
    assert recorder.transfers == 3
