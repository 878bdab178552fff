"""Quantize the weights that share an input: target → rounding → refinement, each checked on validation tokens.

    W ──► target W* ──► codes, scales, zeros ──► refined codes, scales
             ▲                 ▲                        ▲
          C, H⁻¹            H, H⁻¹                      H             of the fitted tokens
             ╰───── validation loss ───────────── validation loss     of the validation tokens

The codes are the quantized values, the zeros the zero points. The Hessian is factored once for all weights and all
steps. A method without targets and refinements has the rounding stage only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq import algorithms
from llmq.algorithms import Options, Rounding, target
from llmq.algorithms.factor import Factor, factorize
from llmq.algorithms.validation_loss import validation_loss
from llmq.methods import Method
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor, where
from llmq.numerics.scheme import WeightScheme
from llmq.report.record import StageGain


@dataclass(frozen=True)
class Rounded:
    """A quantized layer: its original `weight` (N, K) float32, the `rounding`, and what each stage gained."""

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
    """Quantize weights (N, K) that share an input, by path; those with the scheme None are skipped.

    The Hessian is factored once for all of them. Weights with the same scheme are stacked along their rows and solved
    together.
    """
    stage = algorithms.rounding(method.rounding)
    factor = None
    if stats is not None and stats.tokens and (method.alphas or method.refinements or stage.NEEDS_FACTOR):
        factor = factorize(stats.second_moment(), options.order, options.damping)
    layers: list[Rounded] = []
    for scheme in dict.fromkeys(scheme for scheme in map(schemes.get, weights) if scheme is not None):
        same_scheme = {path: weight for path, weight in weights.items() if schemes[path] == scheme}

        # target: what is quantized in the place of each weight
        targets = {path: target.Target(weight, 0.0) for path, weight in same_scheme.items()}
        if stats is not None and factor is not None and method.alphas:
            targets = _targets(same_scheme, stats, factor, method)
        stack = torch.cat([chosen.weight for chosen in targets.values()])
        gains = {path: _target_gain(chosen) for path, chosen in targets.items()}

        # rounding, then refinements
        rounding = stage.round_weight(stack, stats, scheme, options, factor)
        quantized = rounding.quantized
        if stats is not None and factor is not None and method.refinements:
            damped = _damped(stats.second_moment(), factor)
            for name in method.refinements:
                refined = algorithms.refinement(name).refine(stack, quantized, damped, options)
                quantized = _keep_better(name, same_scheme, quantized, refined, stats.validation, gains)

        start = 0
        for path, weight in same_scheme.items():
            stop = start + len(weight)
            notes = (*rounding.notes, *targets[path].notes)
            rows = Rounding(quantized.rows(start, stop), rounding.damping, notes)
            layers.append(Rounded(path, weight, rows, tuple(gains[path])))
            start = stop
    return layers


def _targets(
    weights: Mapping[str, Tensor], stats: InputStats, factor: Factor, method: Method
) -> dict[str, target.Target]:
    """The target of each weight, which is quantized in its place; the weight itself if the float inputs are unknown."""
    cross = stats.cross_moment()
    if cross is None:
        note = ("the target is left out, the float model's inputs are not known for each token",)
        return {path: target.Target(weight, 0.0, notes=note) for path, weight in weights.items()}
    return {
        path: target.choose(weight, target.step(weight, cross, factor), method.alphas, stats.validation)
        for path, weight in weights.items()
    }


def _target_gain(chosen: target.Target) -> list[StageGain]:
    if not chosen.before or chosen.after is None:  # the first layers have the inputs of the float model
        return []
    return [StageGain("target", chosen.before, chosen.after, chosen.alpha > 0)]


def _damped(hessian: Tensor, factor: Factor) -> Tensor:
    """H + λI (K, K), with the damping of the factorization; `hessian` is overwritten."""
    hessian.diagonal().add_(factor.damping * hessian.diagonal().mean())
    return hessian


def _keep_better(
    stage: str,
    weights: Mapping[str, Tensor],
    before: QuantizedTensor,
    after: QuantizedTensor,
    validation: InputStats | None,
    gains: dict[str, list[StageGain]],
) -> QuantizedTensor:
    """For each weight, its rows of `before` or `after`, whichever has the lower loss on the validation tokens.

    The losses are added to `gains`. Without validation tokens the result is `after`.
    """
    if validation is None or validation.tokens == 0:
        return after
    stack = torch.cat(list(weights.values()))
    losses = [validation_loss(stack, quantized.dequantize(), validation) for quantized in (before, after)]
    keep = torch.zeros(len(stack), 1, dtype=torch.bool, device=stack.device)
    start = 0
    for path, weight in weights.items():
        rows = slice(start, start + len(weight))
        loss_before, loss_after = (float(loss[rows].sum(dtype=torch.float64)) for loss in losses)
        keep[rows] = loss_after < loss_before
        gains[path].append(StageGain(stage, loss_before, loss_after, loss_after < loss_before))
        start = rows.stop
    return where(keep, after, before)
