"""The figures of one rounded layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from llmq.algorithms import Rounding, output_error
from llmq.numerics.input_stats import InputStats
from llmq.report.record import LayerReport, StageGain


def layer_report(
    name: str,
    weight: Tensor,
    rounded: Tensor,
    rounding: Rounding,
    packed: Mapping[str, Tensor],
    stats: InputStats | None,
    gains: tuple[StageGain, ...] = (),
) -> LayerReport:
    """How far `rounded` (N, K) is from `weight` (N, K), float32, and what its `packed` tensors take."""
    output = None
    if stats is not None and stats.tokens:
        hessian = stats.second_moment()
        signal = float(output_error(weight, weight * 0, hessian).double().sum())
        output = (float(output_error(weight, rounded, hessian).double().sum()) / signal) ** 0.5 if signal > 0 else 0.0
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
    )


def as_experts(layer: LayerReport, transforms: Sequence[str]) -> LayerReport:
    """The figures of a layer that is an expert's, with what befalls experts alone."""
    notes = layer.notes
    if layer.borrowed:
        notes += ("fitted to other tokens of the layer as well, as its expert saw too few",)
    if transforms:
        notes += (f"{' and '.join(transforms)} left out for an expert",)
    return replace(layer, notes=notes, expert=True)
