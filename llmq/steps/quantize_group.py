"""Round the weights that share an input: target → round → refine, each step judged on tokens that it was not fitted on.

    W ──► target W* ──► codes, scales, zeros ──► refined codes, scales
             ▲                 ▲                        ▲
          C, H⁻¹            H, H⁻¹                      H             of the fitted tokens
             ╰──────── guard ──────────────────────── guard           of the held-out ones

The Hessian is factored once for all weights and all steps.  A method without targets and refinements goes straight to
its rounding stage.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq import algorithms
from llmq.algorithms import Options, Rounding, target
from llmq.algorithms.factor import Factor, factorize
from llmq.algorithms.guard import held_out_loss
from llmq.methods import Method
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor, where
from llmq.numerics.scheme import WeightScheme
from llmq.report.record import StageGain


@dataclass(frozen=True)
class Rounded:
    """A layer's `weight` (N, K) float32 as it was, what became of it, and what each stage bought."""

    path: str
    weight: Tensor
    rounding: Rounding
    gains: tuple[StageGain, ...] = ()


def round_group(
    weights: Mapping[str, Tensor],
    schemes: Mapping[str, WeightScheme | None],
    stats: InputStats | None,
    method: Method,
    options: Options,
) -> list[Rounded]:
    """Quantize weights (N, K) that share an input, by their paths; those whose scheme is None are left out.

    The Hessian is factored once for all of them, and weights of one scheme are solved together, stacked along their
    rows.
    """
    stage = algorithms.rounding(method.rounding)
    factor = None
    if stats is not None and stats.tokens and (method.alphas or method.refinements or stage.NEEDS_FACTOR):
        factor = factorize(stats.second_moment(), options.order, options.damping)
    layers: list[Rounded] = []
    for scheme in dict.fromkeys(scheme for scheme in map(schemes.get, weights) if scheme is not None):
        own = {path: weight for path, weight in weights.items() if schemes[path] == scheme}

        # target: what is quantized in the place of each weight
        targets = {path: target.Target(weight, 0.0) for path, weight in own.items()}
        if stats is not None and factor is not None and method.alphas:
            targets = _targets(own, stats, factor, method)
        stack = torch.cat([chosen.weight for chosen in targets.values()])
        gains = {path: _target_gain(chosen) for path, chosen in targets.items()}

        # round, then refine
        rounding = stage.round_weight(stack, stats, scheme, options, factor)
        quantized = rounding.quantized
        if stats is not None and factor is not None and method.refinements:
            damped = _damped(stats.second_moment(), factor)
            for name in method.refinements:
                refined = algorithms.refinement(name).refine(stack, quantized, damped, options)
                quantized = _judge(name, own, quantized, refined, stats.held_out, gains)

        start = 0
        for path, weight in own.items():
            stop = start + len(weight)
            notes = (*rounding.notes, *targets[path].notes)
            rows = Rounding(quantized.rows(start, stop), rounding.damping, notes)
            layers.append(Rounded(path, weight, rows, tuple(gains[path])))
            start = stop
    return layers


def _targets(
    weights: Mapping[str, Tensor], stats: InputStats, factor: Factor, method: Method
) -> dict[str, target.Target]:
    """For each weight what is rounded in its place; itself where the float model's inputs are not known."""
    cross = stats.cross_moment()
    if cross is None:
        note = ("the target is left out, the float model's inputs are not known token by token",)
        return {path: target.Target(weight, 0.0, notes=note) for path, weight in weights.items()}
    return {
        path: target.choose(weight, target.step(weight, cross, factor), method.alphas, stats.held_out)
        for path, weight in weights.items()
    }


def _target_gain(chosen: target.Target) -> list[StageGain]:
    if not chosen.before or chosen.after is None:  # in front of the first rounded layer nothing has moved
        return []
    return [StageGain("target", chosen.before, chosen.after, chosen.alpha > 0)]


def _damped(hessian: Tensor, factor: Factor) -> Tensor:
    """H + λI (K, K), as it was factored; `hessian` is used up."""
    hessian.diagonal().add_(factor.damping * hessian.diagonal().mean())
    return hessian


def _judge(
    stage: str,
    weights: Mapping[str, Tensor],
    before: QuantizedTensor,
    after: QuantizedTensor,
    judge: InputStats | None,
    gains: dict[str, list[StageGain]],
) -> QuantizedTensor:
    """`after`, with the rows of each weight as they were `before` where that is better on the held-out tokens.

    Notes what was won in `gains`.  Without such tokens nothing speaks against a refinement.
    """
    if judge is None or judge.tokens == 0:
        return after
    whole = torch.cat(list(weights.values()))
    losses = [held_out_loss(whole, each.dequantize(), judge) for each in (before, after)]
    keep = torch.zeros(len(whole), 1, dtype=torch.bool, device=whole.device)
    start = 0
    for path, weight in weights.items():
        rows = slice(start, start + len(weight))
        was, now = (float(loss[rows].sum(dtype=torch.float64)) for loss in losses)
        keep[rows] = now < was
        gains[path].append(StageGain(stage, was, now, now < was))
        start = rows.stop
    return where(keep, after, before)
