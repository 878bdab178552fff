"""The assignment of bits, compared with an exhaustive search over all plans."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import ConfigError
from llmq.mixed_precision import knapsack
from llmq.mixed_precision.knapsack import Choice, allocate

choices = st.builds(Choice, bits=st.integers(0, 60), loss=st.floats(0, 1, allow_nan=False))
problems = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=5)


def every_plan(units: list[list[Choice]], budget: int) -> list[tuple[float, int]]:
    """(loss, bits) of every assignment within the budget."""
    plans = ((math.fsum(c.loss for c in plan), sum(c.bits for c in plan)) for plan in itertools.product(*units))
    return [plan for plan in plans if plan[1] <= budget]


@settings(max_examples=150)
@given(problems, st.integers(0, 250))
def test_no_plan_within_the_budget_is_better(units: list[list[Choice]], budget: int) -> None:
    within = every_plan(units, budget)
    if not within:
        with pytest.raises(ConfigError, match="the smallest choices take"):
            allocate(units, budget)
        return
    taken = [unit[index] for unit, index in zip(units, allocate(units, budget), strict=True)]
    assert sum(choice.bits for choice in taken) <= budget
    assert math.fsum(choice.loss for choice in taken) == pytest.approx(min(within)[0], abs=1e-12)


def test_plan_is_better_than_greedy_gain_per_bit() -> None:
    """By gain per bit the first unit comes first, and then nothing of the second unit fits."""
    units = [[Choice(0, 5.0), Choice(3, 0.0)], [Choice(0, 6.0), Choice(4, 0.0)]]
    assert allocate(units, 4) == [0, 1]


def test_cheapest_of_equal_plans_is_chosen() -> None:
    assert allocate([[Choice(9, 1.0), Choice(4, 1.0), Choice(5, 1.0)]], 10) == [1]


def test_coarse_steps_never_exceed_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [[Choice(1000 + 7 * u, 9.0 - u), Choice(2000 + 13 * u, 4.0), Choice(4001 + u, 0.0)] for u in range(5)]
    exact = allocate(units, 11_003)
    monkeypatch.setattr(knapsack, "STEPS", 500)
    coarse = allocate(units, 11_003)
    bits, losses = ([sum(getattr(u[i], f) for u, i in zip(units, plan, strict=True)) for plan in (exact, coarse)]
                    for f in ("bits", "loss"))  # fmt: skip
    assert max(bits) <= 11_003
    assert losses[0] == min(every_plan(units, 11_003))[0]
    # Each unit may be charged one step (spare / 500 bits) too much, so compare with a budget reduced by that.
    spare = 11_003 - sum(u[0].bits for u in units)
    assert losses[1] <= min(every_plan(units, 11_003 - 5 * (1 + spare // 500)))[0]
