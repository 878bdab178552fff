"""Spend a budget of bits where they buy most.

Each unit u (layers that must be alike) may be stored in one of several ways c, which costs b_uc bits and loses l_uc.
Which choice c(u) has the least loss in all?

    minimise  Σ_u l_u,c(u)      where  Σ_u b_u,c(u) ≤ B

This is the knapsack problem with classes, of which one member each is taken (Sinha and Zoltners 1979).  What every
plan has to pay, the cheapest choice of each unit, is taken off both sides; of what is left, E bits,

    F_u(e) = min_c  F_{u-1}(e - (b_uc - min_c b_uc)) + l_uc      F_0(e) = 0      0 ≤ e ≤ E

gives the least loss of the first u units with at most e bits, and the way back from F(E) the choices.  That is exact,
where going by gain per bit (the convex hull, Lagrange's multiplier) leaves a part of the budget unspent.  Bits come in
steps, the greatest common divisor of all costs, as layers come in few shapes.  Where that makes more than `STEPS`
steps they are made longer and costs are rounded up: a plan never costs more than B, and may leave a step a unit unused.

Of plans with the same loss the one that is found first is taken, cheaper choices first; nothing is drawn at random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.errors import ConfigError

STEPS = 2**17


@dataclass(frozen=True)
class Choice:
    """One way to store a unit: how many bits it takes in all, and what is lost by it."""

    bits: int
    loss: float


def allocate(units: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Which of its choices each unit takes, so that the sum of losses is least for `budget` bits.

    Raises ConfigError where the cheapest choices cost more than the budget.
    """
    cheapest = [min(choice.bits for choice in choices) for choices in units]
    spare = budget - sum(cheapest)
    if spare < 0:
        raise ConfigError(f"{budget} bits are asked for, and the least that can be spent is {sum(cheapest)}")
    extra = [[choice.bits - base for choice in choices] for choices, base in zip(units, cheapest, strict=True)]
    step = max(math.gcd(*(bits for each in extra for bits in each)), 1 + spare // STEPS)
    room = min(spare // step, sum(-(-max(each) // step) for each in extra))
    least = np.zeros(room + 1)  # F, (steps,) float64
    taken = np.zeros((len(units), room + 1), dtype=np.int16)
    for unit, choices in enumerate(units):
        best = np.full(room + 1, np.inf)
        for index in sorted(range(len(choices)), key=lambda index: choices[index].bits):
            steps = -(-extra[unit][index] // step)
            if steps > room:
                continue
            loss = least[: room + 1 - steps] + choices[index].loss
            better = loss < best[steps:]
            best[steps:][better] = loss[better]
            taken[unit, steps:][better] = index
        least = best
    return _way_back(taken, extra, step)


def _way_back(taken: NDArray[np.int16], extra: Sequence[Sequence[int]], step: int) -> list[int]:
    """The choices that led to the last entry of the last row of `taken` (units, steps)."""
    chosen = []
    left = taken.shape[1] - 1
    for unit in reversed(range(len(taken))):
        index = int(taken[unit, left])
        chosen.append(index)
        left -= -(-extra[unit][index] // step)
    return chosen[::-1]
