"""Coordinate descent against all codes of a tiny row, and against a loop over single entries."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options, descent, output_error
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme

OPTIONS = Options()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(K: int) -> Tensor:
    """Strongly correlated inputs: nearest codes are far from the best ones."""
    X = random(4 * K, K, seed=1) @ random(K, K, seed=2) + random(4 * K, 1, seed=3)
    return X.T @ X / len(X) + 0.01 * torch.eye(K)


def nearest(weight: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    chosen = affine_grid.fit_minmax(weight, scheme, torch.float32)
    return chosen.quantized(chosen.encode(weight))


def losses(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    return output_error(weight.double(), quantized.dequantize().double(), hessian.double())


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_codes_of_two_bits_end_in_a_local_minimum_and_not_below_the_least_of_all(symmetric: bool) -> None:
    weight, hessian = random(64, 4), hessian_of(4)
    start = nearest(weight, WeightScheme(2, "channel", symmetric))
    found = start
    while True:  # until nothing moves
        last, found = found, descent.refine(weight, found, hessian, OPTIONS)
        assert bool((losses(weight, found, hessian) <= losses(weight, last, hessian)).all())
        if torch.equal(found.codes, last.codes):
            break
    reached = losses(weight, found, hessian)
    assert bool((reached < losses(weight, start, hessian)).any())
    everything = []
    for codes in itertools.product(range(4), repeat=4):
        candidate = torch.tensor(codes, dtype=torch.uint8).expand(64, 4)
        everything.append((candidate, losses(weight, dataclasses.replace(found, codes=candidate), hessian)))
    least = torch.stack([loss for _, loss in everything]).amin(0)
    assert bool((reached >= least - 1e-9).all())
    for candidate, loss in everything:  # no neighbour that differs in one code is lower
        neighbour = (candidate != found.codes).sum(1) == 1
        assert bool((loss[neighbour] >= reached[neighbour] - 1e-5 * reached[neighbour]).all())


def entry_by_entry(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> list[list[int]]:
    """The slow twin: every code of every entry is tried, with the whole loss each time."""
    codes = quantized.codes.tolist()
    scales, zeros = quantized.scales.double().tolist(), quantized.zeros
    K, groups = weight.shape[1], quantized.column_groups().tolist()
    H = hessian.double()
    for n, row in enumerate(codes):
        middles = [quantized.scheme.middle if zeros is None else int(zeros[n, g]) for g in groups]

        def loss(row: list[int], n: int = n, middles: list[int] = middles) -> float:
            values = [scales[n][groups[k]] * (row[k] - middles[k]) for k in range(K)]
            delta = weight[n].double() - torch.tensor(values, dtype=torch.float64)
            return float(delta @ H @ delta)

        for k in range(K):
            row[k] = min(range(quantized.scheme.levels + 1), key=lambda code: loss([*row[:k], code, *row[k + 1 :]]))
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_takes_the_best_code_of_each_entry_in_turn(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "COLUMNS", 7)  # blocks that end inside of groups, and a short last one
    weight, hessian = random(6, 32), hessian_of(32)
    start = nearest(weight, WeightScheme(3, 16, symmetric))
    found = descent.refine(weight, start, hessian, OPTIONS)
    assert found.codes.tolist() == entry_by_entry(weight, start, hessian)
    assert not torch.equal(found.codes, start.codes)
    assert found.codes.dtype == torch.uint8 and found.scales is start.scales


def test_a_row_that_would_end_up_worse_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = random(6, 32), hessian_of(32)
    start = nearest(weight, WeightScheme(4, 16))
    spoilt = start.codes.T.contiguous()
    spoilt[:, 2] = 15 - spoilt[:, 2]
    monkeypatch.setattr(descent, "_sweep", lambda *_: spoilt)
    assert torch.equal(descent.refine(weight, start, hessian, OPTIONS).codes, start.codes)
