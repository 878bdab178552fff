"""The metrics of one quantized layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmq.algorithms import Options, Rounding, output_error, quadratic_form, rtn
from llmq.distributed.ranks import ALONE, Ranks
from llmq.numerics.input_stats import InputStats
from llmq.numerics.scheme import WeightScheme
from llmq.report.record import LayerReport, StageGain


def layer_report(
    name: str,
    weight: Tensor,
    rounded: Tensor,
    rounding: Rounding,
    packed: Mapping[str, Tensor],
    stats: InputStats | None,
    gains: tuple[StageGain, ...] = (),
    ranks: Ranks = ALONE,
    options: Options | None = None,
) -> LayerReport:
    """The errors of `rounded` (N, K) against `weight` (N, K), float32, and the size of its `packed` tensors.

    Each rank computes the output error of some rows. With `options`, the weight is also rounded to nearest, and its
    error is reported.
    """
    output = nearest = activation_outlier = None
    if stats is not None and stats.tokens:
        hessian, part = stats.second_moment(), ranks.part(len(weight))
        rows = slice(part.start, part.stop)
        loss = output_error(weight[rows], rounded[rows], hessian) if rounding.loss is None else rounding.loss[rows]
        losses = [quadratic_form(weight[rows], hessian), loss]
        alone = ranks.size == 1 or not rounding.quantized.scheme.shares_rows  # else rows of other ranks set the scales
        if options is not None and not rounding.existing_grid and alone:
            losses.append(_rtn_loss(weight[rows], hessian, rounding.quantized.scheme, options))
        signal, *noises = ranks.total(*(float(values.double().sum()) for values in losses))
        output, *others = ((max(0.0, noise) / signal) ** 0.5 if signal > 0 else 0.0 for noise in noises)
        nearest = next(iter(others), None)
        channels = hessian.diagonal().clamp(min=0).sqrt()
        activation_outlier = _ratio(channels.max(), channels.median())
    stored_bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in packed.values())
    norm = float(weight.norm())
    return LayerReport(
        name=name,
        scheme=str(rounding.quantized.scheme),
        bits_per_weight=stored_bits / weight.numel(),
        weight_error=float((weight - rounded).norm()) / norm if norm > 0 else 0.0,
        output_error=output,
        tokens=stats.tokens - stats.borrowed if stats is not None else 0,
        borrowed=stats.borrowed if stats is not None else 0,
        damping=rounding.damping,
        notes=rounding.notes,
        gains=gains,
        existing_grid=rounding.existing_grid,
        weight_outlier=_ratio(weight.abs().max(), weight.norm() / weight.numel() ** 0.5),
        activation_outlier=activation_outlier,
        scales=_by_exponent(rounding.quantized.scales),
        rtn_error=nearest,
    )


def _ratio(largest: Tensor, usual: Tensor) -> float | None:
    return float(largest / usual) if float(usual) > 0 else None


def _by_exponent(scales: Tensor) -> tuple[tuple[int, int], ...]:
    """How many scales have which binary exponent, the smallest exponent first; zeros are not counted."""
    exponents, counts = torch.frexp(scales[scales != 0].to(torch.float32)).exponent.unique(return_counts=True)
    return tuple(zip(exponents.tolist(), counts.tolist(), strict=True))


def _rtn_loss(weight: Tensor, hessian: Tensor, scheme: WeightScheme, options: Options) -> Tensor:
    """(N,) float32: the output error of each row of `weight` (N, K) after rounding to nearest."""
    return output_error(weight, rtn.round_weight(weight, None, scheme, options).quantized.dequantize(), hessian)


def as_experts(layer: LayerReport, transforms: Sequence[str]) -> LayerReport:
    """The report of a layer of an expert, with the notes that apply only to experts."""
    notes = layer.notes
    if layer.borrowed:
        notes += ("also fitted to other tokens of the layer, because the expert saw too few",)
    if transforms:
        notes += (f"{' and '.join(transforms)} not applied to experts",)
    return replace(layer, notes=notes, expert=True)
