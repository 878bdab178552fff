"""Choose the scheme of each weight: overrides, skips, and fallbacks for group sizes that do not divide.

If the group size does not divide in_features (128 and 172, for example), the fallbacks are: the largest smaller size
16 * 2**n that divides it, then one scale per row. Blocks of fp8 that do not fit become fp8 with one scale per row. If
the format cannot pack that, the weight is kept in float. Every fallback is reported with its reason; with `strict` it
is an error.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.formats.base import Layout
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import GROUP_SIZES, GroupSize, Scheme, WeightScheme


def plan_layers(shapes: Iterable[tuple[str, int, int]], config: QuantConfig, layout: Layout) -> list[LayerPlan]:
    """A plan for each (name, out_features, in_features); raises ConfigError where the format cannot hold it."""
    plans = [_plan(name, rows, columns, config, layout) for name, rows, columns in shapes]
    if layout.one_grid and not config.overrides:
        plans = _on_one_grid(plans, layout)
    if not any(plan.scheme.weights for plan in plans):
        reasons = "; ".join(sorted({plan.reason for plan in plans if plan.reason})) or "no linear layer in any block"
        raise ConfigError(f"no layer can be quantized: {reasons}", hint="change --skip, --override or --format")
    return plans


def alike(
    plans: Mapping[str, LayerPlan], units: Iterable[Sequence[str]], config: QuantConfig, layout: Layout
) -> dict[str, LayerPlan]:
    """`plans` with one scheme for all layers of each unit, such as the experts of a layer: engines run them as one.

    Of the schemes that every layer of the unit can have, the one with the most bits, then the largest groups, is
    chosen. If one layer is kept in float, all are. Raises ConfigError if this changes a plan and `strict` is set.
    """
    result = dict(plans)
    for unit in units:
        schemes = {plans[key].scheme.weights for key in unit}
        if len(schemes) < 2:
            continue
        common = _common_scheme([plans[key] for key in unit], layout)
        for key in unit:
            if plans[key].scheme.weights != common:
                changed = result[key] = _with_common(plans[key], common, [plans[key] for key in unit])
                if config.strict:
                    raise ConfigError(f"{changed.name}: {changed.reason}", hint="leave --strict out to allow this")
    return result


def _common_scheme(plans: Sequence[LayerPlan], layout: Layout) -> WeightScheme | None:
    schemes = {plan.scheme.weights for plan in plans}
    candidates = [scheme for scheme in schemes if scheme is not None]
    if len(candidates) < len(schemes):
        return None
    candidates.sort(key=lambda s: (-s.bits, -s.group_size if isinstance(s.group_size, int) else 0, str(s)))

    def fits(scheme: WeightScheme) -> bool:
        return all(layout.refusal(scheme, plan.out_features, plan.in_features) is None for plan in plans)

    return next((scheme for scheme in candidates if fits(scheme)), None)


def _with_common(plan: LayerPlan, scheme: WeightScheme | None, unit: Sequence[LayerPlan]) -> LayerPlan:
    if scheme is not None:
        reason = f"{scheme} instead of {plan.scheme.weights}: the experts of a layer share a grid"
        return plan.with_weights(scheme, reason)
    float_layer = next((other for other in unit if other.scheme.weights is None), None)
    why = f"{float_layer.name} is kept in float ({float_layer.reason})" if float_layer else "no grid fits all of them"
    return plan.with_weights(None, f"the experts of a layer share a grid, and {why}")


def _on_one_grid(plans: list[LayerPlan], layout: Layout) -> list[LayerPlan]:
    """The plans with the grid that covers most weights; layers that fell back to another grid are kept in float."""
    covered: dict[WeightScheme, int] = {}
    for plan in plans:
        if plan.scheme.weights is not None:
            covered[plan.scheme.weights] = covered.get(plan.scheme.weights, 0) + plan.weights
    if len(covered) < 2:
        return plans
    common = max(covered, key=lambda scheme: covered[scheme])
    reason = f"kept in float: {layout.name} holds one grid for all layers, and most are {common}"
    return [plan if plan.scheme.weights in (None, common) else plan.with_weights(None, reason) for plan in plans]


def _plan(name: str, out_features: int, in_features: int, config: QuantConfig, layout: Layout) -> LayerPlan:
    requested, inputs = config.scheme_for(name), config.inputs_for(name)
    if requested is None:
        return LayerPlan(name, out_features, in_features, Scheme(), "skipped on request")
    if inputs is not None and layout.with_inputs is not None:
        no_engine = layout.with_inputs.refusal(Scheme(requested, inputs))
        if no_engine:
            raise ConfigError(
                f"{name} cannot have {Scheme(requested, inputs)}: {no_engine}",
                hint="change --bits, --group-size or --activations, or keep the inputs of such layers in float: "
                "--override 'PATTERN:activations=none'",
            )
    impossible = layout.refusal(requested, 1024, 1024)
    if impossible:
        raise ConfigError(f"{layout.name} cannot hold {requested}, the scheme of {name}: {impossible}")
    candidates = [requested, *_fallbacks(requested, in_features)]
    refusals = []
    for scheme in candidates:
        refusal = layout.refusal_of(Scheme(scheme, inputs), out_features, in_features)
        if refusal is None:
            break
        refusals.append(refusal)
    else:
        scheme = None
    if not refusals:
        return LayerPlan(name, out_features, in_features, Scheme(requested, inputs))
    names = (requested, scheme) if requested.floats else (requested.group_size, scheme and scheme.group_size)
    outcome = f"{names[1]} instead of {names[0]}" if scheme else "kept in float"
    reason = f"{outcome}: {refusals[0] if scheme else refusals[-1]}"
    if config.strict:
        raise ConfigError(f"{name} ({out_features} x {in_features}): {reason}", hint="leave --strict out to allow this")
    return LayerPlan(name, out_features, in_features, Scheme(scheme, inputs if scheme else None), reason)


def _fallbacks(scheme: WeightScheme, in_features: int) -> list[WeightScheme]:
    """Fallbacks, best first: the largest smaller group size that divides, then one scale per row."""
    if scheme.rows_per_scale > 1:
        return [WeightScheme.of_floats("fp8")]
    if not isinstance(scheme.group_size, int) or scheme.floats is not None:
        return []
    sizes: list[GroupSize] = [
        size for size in reversed(GROUP_SIZES) if size < scheme.group_size and in_features % size == 0
    ]
    fallbacks: list[GroupSize] = [*sizes[:1], "channel"]
    return [dataclasses.replace(scheme, group_size=size) for size in fallbacks]
