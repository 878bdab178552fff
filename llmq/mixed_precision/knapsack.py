"""Distribute a budget of bits so that the total loss is least: the multiple-choice knapsack problem.

Each unit u (layers that must have the same grid) may be stored in one of several ways c, which takes b_uc bits and
causes the loss l_uc. Which choices c(u) have the least loss in total?

    minimise  Σ_u l_u,c(u)      where  Σ_u b_u,c(u) ≤ B

This is the multiple-choice knapsack problem (Sinha and Zoltners 1979). The cheapest choice of each unit is the minimum,
which is subtracted from both sides; of the remaining E bits,

    F_u(e) = min_c  F_{u-1}(e - (b_uc - min_c b_uc)) + l_uc      F_0(e) = 0      0 ≤ e ≤ E

is the least loss of the first u units with at most e bits. Going back from F(E) gives the choices. This is exact, while
choosing by gain per bit (the convex hull, Lagrange's multiplier) leaves a part of the budget unspent. Bits are counted
in steps, the greatest common divisor of all costs, because layers have few different shapes. If that makes more than
`STEPS` steps, the steps are made longer and costs are rounded up: a solution never takes more than B bits, and may
leave one step per unit unused.

Of solutions with the same loss the first one is taken, with cheaper choices first; nothing is random.
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
    """One way to store a unit: its total bits, and the loss that it causes."""

    bits: int
    loss: float


def allocate(units: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of the choice of each unit, so that the sum of losses is least for `budget` bits.

    Raises ConfigError if the cheapest choices take more bits than the budget.
    """
    cheapest = [min(choice.bits for choice in choices) for choices in units]
    spare = budget - sum(cheapest)
    if spare < 0:
        raise ConfigError(
            f"the budget is {budget} bits, but the smallest choices take {sum(cheapest)} bits",
            hint="raise --target-bits, or add a smaller grid: --bits 3",
        )
    extra = [[choice.bits - base for choice in choices] for choices, base in zip(units, cheapest, strict=True)]
    step = max(math.gcd(*(bits for unit_bits in extra for bits in unit_bits)), 1 + spare // STEPS)
    room = min(spare // step, sum(-(-max(unit_bits) // step) for unit_bits in extra))
    least = np.zeros(room + 1)  # F, (steps,) float64
    chosen = np.zeros((len(units), room + 1), dtype=np.int16)
    for unit, choices in enumerate(units):
        best = np.full(room + 1, np.inf)
        for index in sorted(range(len(choices)), key=lambda index: choices[index].bits):
            steps = -(-extra[unit][index] // step)
            if steps > room:
                continue
            loss = least[: room + 1 - steps] + choices[index].loss
            better = loss < best[steps:]
            best[steps:][better] = loss[better]
            chosen[unit, steps:][better] = index
        least = best
    return _backtrack(chosen, extra, step)


def _backtrack(chosen: NDArray[np.int16], extra: Sequence[Sequence[int]], step: int) -> list[int]:
    """The choices that lead to the last entry of the last row of `chosen` (units, steps)."""
    indices = []
    remaining = chosen.shape[1] - 1
    for unit in reversed(range(len(chosen))):
        index = int(chosen[unit, remaining])
        indices.append(index)
        remaining -= -(-extra[unit][index] // step)
    return indices[::-1]
