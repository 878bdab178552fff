"""Weights that several ranks quantize together equal those that one process quantizes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.algorithms import Options
from llmq.distributed.ranks import ALONE, Ranks
from llmq.methods import METHODS
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme
from llmq.steps.round_group import Rounded
from llmq.steps.round_together import Group, round_together
from tests import rank_threads

K = 256


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(seed: int) -> InputStats:
    stats = InputStats(K, torch.device("cpu"))
    for running, shift in ((stats, 1), (stats.begin_validation(), 2)):
        X = random(400, K, seed=seed + shift) @ random(K, K, seed=3)
        running.update(0.9 * X + 0.5 * random(400, K, seed=seed + 9), X)
    return stats


def groups(count: int, scheme: WeightScheme, rows: int = 40) -> list[Group]:
    shapes = {"q": rows, "k": 24, "left": 24}
    return [
        Group(
            {path: random(N, K, seed=seed + N) for path, N in shapes.items()},
            {"q": scheme, "k": scheme, "left": None},
            statistics(10 * seed),
        )
        for seed in range(count)
    ]


def solved(ranks: Ranks, method: str, count: int, scheme: WeightScheme) -> list[list[Rounded]]:
    return round_together(groups(count, scheme), METHODS[method], Options(), ranks)


SCHEMES = [WeightScheme(3, 32), WeightScheme(4, 32, symmetric=False), WeightScheme(4, "tensor"),
           WeightScheme.of_blocks("q4_k")]  # fmt: skip


@pytest.mark.parametrize(("method", "count"), [("gptq", 1), ("balanced", 1), ("balanced", 4), ("rtn", 1)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_several_ranks_quantize_as_one(method: str, count: int, scheme: WeightScheme) -> None:
    alone = solved(ALONE, method, count, scheme)
    for together in rank_threads.run(3, lambda ranks: solved(ranks, method, count, scheme)):
        for ours, theirs in zip(together, alone, strict=True):
            assert [layer.path for layer in ours] == [layer.path for layer in theirs] == ["q", "k"]
            for layer, expected in zip(ours, theirs, strict=True):
                assert_equal(layer, expected)


def assert_equal(layer: Rounded, expected: Rounded) -> None:
    ours, theirs = layer.rounding.quantized, expected.rounding.quantized
    changed = (ours.codes != theirs.codes).float().mean()
    assert float(changed) <= 0.001, "products with fewer rows round differently, rarely in the middle of two codes"
    torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=0, atol=0.5)
    assert layer.weight.equal(expected.weight) and layer.rounding.damping == expected.rounding.damping
    assert [(gain.stage, gain.kept) for gain in layer.gains] == [(gain.stage, gain.kept) for gain in expected.gains]
    for gain, other in zip(layer.gains, expected.gains, strict=True):
        assert gain.after == pytest.approx(other.after, rel=1e-3)


def test_notes_of_all_rows_are_kept() -> None:
    def notes(ranks: Ranks) -> Any:
        return [layer.rounding.notes for layer in solved(ranks, "gptq", 1, SCHEMES[0])[0]]

    assert rank_threads.run(2, notes) == [notes(ALONE)] * 2
