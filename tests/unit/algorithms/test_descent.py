"""Coordinate descent compared with all codes of a tiny row, and with a loop over single entries."""

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
def test_descent_ends_in_a_local_minimum(symmetric: bool) -> None:
    weight, hessian = random(64, 4), hessian_of(4)
    start = nearest(weight, WeightScheme(2, "channel", symmetric))
    refined = start
    while True:  # until no code changes
        last, refined = refined, descent.refine(weight, refined, hessian, OPTIONS)
        assert bool((losses(weight, refined, hessian) <= losses(weight, last, hessian)).all())
        if torch.equal(refined.codes, last.codes):
            break
    reached = losses(weight, refined, hessian)
    assert bool((reached < losses(weight, start, hessian)).any())
    candidates = []
    for codes in itertools.product(range(4), repeat=4):
        candidate = torch.tensor(codes, dtype=torch.uint8).expand(64, 4)
        candidates.append((candidate, losses(weight, dataclasses.replace(refined, codes=candidate), hessian)))
    least = torch.stack([loss for _, loss in candidates]).amin(0)
    assert bool((reached >= least - 1e-9).all())
    for candidate, loss in candidates:  # no candidate that differs in one code has a lower loss
        neighbour = (candidate != refined.codes).sum(1) == 1
        assert bool((loss[neighbour] >= reached[neighbour] - 1e-5 * reached[neighbour]).all())


def entry_by_entry(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> list[list[int]]:
    """The slow reference: every code of every entry is tried, with the whole loss each time."""
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
    refined = descent.refine(weight, start, hessian, OPTIONS)
    assert refined.codes.tolist() == entry_by_entry(weight, start, hessian)
    assert not torch.equal(refined.codes, start.codes)
    assert refined.codes.dtype == torch.uint8 and refined.scales is start.scales


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_gets_worse_in_several_blocks_of_correlated_columns(symmetric: bool) -> None:
    weight, hessian = random(40, 300), hessian_of(300)
    start = nearest(weight, WeightScheme(4, "channel", symmetric))
    before, after = (losses(weight, q, hessian) for q in (start, descent.refine(weight, start, hessian, OPTIONS)))
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < 0.9 * float(before.sum())
