"""The loss on validation tokens compared with the outputs themselves, in float64."""

import pytest
import torch
from torch import Tensor

from llmq.algorithms.validation_loss import ValidationLoss
from llmq.numerics.input_stats import InputStats

T, K, N = 50, 8, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("originals", [True, False])
def test_the_loss_is_the_mean_squared_error_of_each_output(originals: bool) -> None:
    moved, weight = random(T, K) + 0.5, random(N, K, seed=1)
    X = moved + 0.3 * random(T, K, seed=2) if originals else moved
    rounded = weight + 0.1 * random(N, K, seed=3)
    judge = InputStats(K, torch.device("cpu")).begin_validation()
    for start in (0, 20):
        part = slice(start, start + (20 if start == 0 else 30))
        judge.update(moved[part], X[part] if originals else None)
    expected = (X.double() @ weight.double().T - moved.double() @ rounded.double().T).square().mean(0)
    torch.testing.assert_close(ValidationLoss(weight, judge).of(rounded).double(), expected, rtol=1e-4, atol=0)
