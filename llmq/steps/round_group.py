"""Quantize the weights that share an input: target → rounding → refinement, each checked on validation tokens.

    W ──► target W* ──► codes, scales, zeros ──► refined codes, scales
             ▲                 ▲                        ▲
          C, H⁻¹            H, H⁻¹                      H             of the fitted tokens
             ╰───── validation loss ───────────── validation loss     of the validation tokens

The codes are the quantized values, the zeros the zero points. The Hessian is factored once for all weights and all
steps. A method without targets and refinements has the rounding stage only. If there is reason to doubt the statistics,
the result of that stage is compared with rounding to nearest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmq import algorithms
from llmq.algorithms import Options, Rounding, output_error, rtn, target
from llmq.algorithms.factor import Factor, factorize
from llmq.algorithms.validation_loss import ValidationLoss
from llmq.distributed.ranks import ALONE, Total
from llmq.methods import Method
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor, where, with_zeros
from llmq.numerics.scheme import WeightScheme
from llmq.report.record import StageGain

ENOUGH = 2  # tokens per input; with fewer, statistics of the text are doubted


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
    total: Total = ALONE.total,
) -> list[Rounded]:
    """Quantize weights (N, K) that share an input, by path; those with the scheme None are skipped.

    The Hessian is factored once for all of them. Weights with the same scheme are stacked along their rows and solved
    together. If other ranks have other rows of the same weights, `total` adds up what is compared.
    """
    stage = algorithms.rounding(method.rounding)
    factor = None
    if stats is not None and stats.tokens and (method.alphas or method.refinements or stage.NEEDS_FACTOR):
        factor = factorize(stats.second_moment(), options.order, options.damping)
    layers: list[Rounded] = []
    for scheme in dict.fromkeys(scheme for scheme in map(schemes.get, weights) if scheme is not None):
        same_scheme = {path: weight for path, weight in weights.items() if schemes[path] == scheme}
        layers += _round_stack(same_scheme, scheme, _Fit(stats, factor, method, options.on(scheme), total))
    return layers


@dataclass(frozen=True)
class _Fit:
    """What all weights that share an input are fitted with."""

    stats: InputStats | None
    factor: Factor | None
    method: Method
    options: Options
    total: Total


def _round_stack(weights: Mapping[str, Tensor], scheme: WeightScheme, fit: _Fit) -> list[Rounded]:
    """Quantize weights with the same scheme, stacked along their rows."""
    stats, factor, method, options = fit.stats, fit.factor, fit.method, fit.options
    originals = torch.cat(list(weights.values()))
    validation = None
    if stats is not None and factor is not None and (method.alphas or method.refinements):
        validation = _validation(originals, stats)

    # target: what is quantized in the place of each weight
    targets = {path: target.Target(weight, 0.0) for path, weight in weights.items()}
    if stats is not None and factor is not None and method.alphas:
        targets = _targets(weights, originals, fit, validation)
    stack = torch.cat([chosen.weight for chosen in targets.values()])
    gains = {path: _target_gain(chosen) for path, chosen in targets.items()}

    # rounding, then refinements
    rounding = algorithms.rounding(method.rounding).round_weight(stack, stats, scheme, options, factor)
    quantized, doubts = _nearest_if_better(weights, originals, rounding, scheme, fit)
    if stats is not None and factor is not None and method.refinements:
        damped = _damped(stats.second_moment(), factor)
        loss = None if validation is None else validation.of(quantized.dequantize())
        for name in method.refinements:
            refined = algorithms.refinement(name).refine(stack, quantized, damped, options)
            if validation is None or loss is None:
                quantized = refined
                continue
            refined_loss = validation.of(refined.dequantize())
            keep = _keep_better(name, weights, loss, refined_loss, gains, fit.total)
            quantized, loss = where(keep[:, None], refined, quantized), torch.where(keep, refined_loss, loss)

    quantized = with_zeros(quantized, originals)
    layers, start = [], 0
    for path, weight in weights.items():
        stop = start + len(weight)
        rows, notes = rounding.rows(start, stop), (*rounding.notes, *targets[path].notes, *doubts.get(path, ()))
        loss_of_rows = None if targets[path].alpha or method.refinements or path in doubts else rows.loss
        rows = Rounding(quantized.rows(start, stop), rounding.damping, notes, loss_of_rows)
        layers.append(Rounded(path, weight, rows, tuple(gains[path])))
        start = stop
    return layers


def _nearest_if_better(
    weights: Mapping[str, Tensor], originals: Tensor, rounding: Rounding, scheme: WeightScheme, fit: _Fit
) -> tuple[QuantizedTensor, dict[str, tuple[str, ...]]]:
    """The stack that the rounding stage made, or weights of it rounded to nearest, if there is reason for doubt.

    There is if the Hessian needed more damping, or comes from fewer tokens than twice the inputs of the weight. Then
    the errors on the validation tokens are compared, or without such tokens the probable ones on other text. Also
    returns notes for the user, by path.
    """
    stats, options, name = fit.stats, fit.options, fit.method.rounding
    if name == "rtn" or stats is None or not stats.tokens:
        return rounding.quantized, {}
    K = originals.shape[1]
    if stats.tokens >= ENOUGH * K and rounding.damping in (None, options.damping):
        return rounding.quantized, {}
    nearest = rtn.round_weight(originals, stats, scheme, options).quantized
    losses, where_worse = _judge(originals, stats)
    before, after = (losses(quantized.dequantize()) for quantized in (rounding.quantized, nearest))
    keep = _keep_better("nearest", weights, before, after, {path: [] for path in weights}, fit.total)
    few = (f"{stats.tokens} tokens for {K} inputs: more text would make it better",) if stats.tokens < K else ()
    notes, start = {}, 0
    for path, weight in weights.items():
        worse = (f"rounded to nearest, because {name} was {where_worse}",) if bool(keep[start]) else ()
        notes[path] = (*few, *worse)
        start += len(weight)
    return where(keep[:, None], nearest, rounding.quantized), notes


def _judge(weights: Tensor, stats: InputStats) -> tuple[Callable[[Tensor], Tensor], str]:
    """The loss per row of rounded weights on the validation tokens, or the probable one if there are none; its name."""
    validation = _validation(weights, stats)
    if validation is not None:
        return validation.of, "worse on validation tokens"
    return partial(output_error, weights, hessian=_likely_hessian(stats)), "probably worse on other text"


def _likely_hessian(stats: InputStats) -> Tensor:
    """(K, K) float32, the probable Hessian of other text: that of the fitted tokens, with smaller correlations.

    A method is fitted to the correlations of its T tokens, and few tokens show correlations that other text does not
    have. So they are multiplied by T/(T + K). The mean squares of the inputs are kept.
    """
    hessian = stats.second_moment()
    squares = hessian.diagonal().clone()
    hessian *= stats.tokens / (stats.tokens + len(squares))
    hessian.diagonal().copy_(squares)
    return hessian


def _validation(weights: Tensor, stats: InputStats) -> ValidationLoss | None:
    """The loss in the place of `weights` (N, K) on the validation tokens; None if there are none."""
    judge = stats.validation
    return ValidationLoss(weights, judge) if judge is not None and judge.tokens else None


def _targets(
    weights: Mapping[str, Tensor], stack: Tensor, fit: _Fit, validation: ValidationLoss | None
) -> dict[str, target.Target]:
    """The target of each weight, which is quantized in its place; the weight itself if the float inputs are unknown.

    stack  (N, K), all of the weights
    """
    assert fit.stats is not None and fit.factor is not None, "a target needs statistics"
    cross = fit.stats.cross_moment()
    if cross is None:
        note = ("the target is left out, the float model's inputs are not known for each token",)
        return {path: target.Target(weight, 0.0, notes=note) for path, weight in weights.items()}
    steps = target.step(stack, cross, fit.factor)
    loss = None if validation is None else validation.along(steps)
    targets, start = {}, 0
    for path, weight in weights.items():
        stop = start + len(weight)
        own = None if loss is None else loss.rows(start, stop)
        targets[path] = target.choose(weight, steps[start:stop], fit.method.alphas, own, fit.total)
        start = stop
    return targets


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
    before: Tensor,
    after: Tensor,
    gains: dict[str, list[StageGain]],
    total: Total,
) -> Tensor:
    """(N,) bool: the rows of the weights whose validation loss, summed over the rows of the weight, a stage lowered.

    before, after  (N,) float32, the loss of each row. The sums are added to `gains`.
    """
    keep = torch.zeros(len(before), dtype=torch.bool, device=before.device)
    start = 0
    for path, weight in weights.items():
        rows = slice(start, start + len(weight))
        loss_before, loss_after = total(*(float(loss[rows].sum(dtype=torch.float64)) for loss in (before, after)))
        keep[rows] = loss_after < loss_before
        gains[path].append(StageGain(stage, loss_before, loss_after, loss_after < loss_before))
        start = rows.stop
    return keep
