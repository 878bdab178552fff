"""Which grid each weight gets: overrides, skips, and what to do where a group size does not divide.

The rule for in_features that the group size does not divide (172 and 128, say): the largest smaller size of 16 * 2**n
that divides, else one scale a row, else, where the format cannot pack that, the weight stays as it is.  Every step is
listed with its reason; `strict` makes it an error.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.formats.base import Layout
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import GROUP_SIZES, GroupSize, Scheme, WeightScheme


def plan_layers(shapes: Iterable[tuple[str, int, int]], config: QuantConfig, layout: Layout) -> list[LayerPlan]:
    """A plan for each (name, out_features, in_features); raises ConfigError for what the format can never hold."""
    plans = [_plan(name, rows, columns, config, layout) for name, rows, columns in shapes]
    if layout.one_grid and not config.overrides:
        plans = _on_one_grid(plans, layout)
    if not any(plan.scheme.weights for plan in plans):
        reasons = "; ".join(sorted({plan.reason for plan in plans if plan.reason})) or "no linear layer in any block"
        raise ConfigError(f"nothing is left to quantize: {reasons}", hint="see --skip, --override and --format")
    return plans


def alike(
    plans: Mapping[str, LayerPlan], units: Iterable[Sequence[str]], config: QuantConfig, layout: Layout
) -> dict[str, LayerPlan]:
    """`plans` with one grid for the layers of each unit, such as the experts of a layer: engines run them as one.

    That is the grid of most bits and, of these, the largest groups which every one of them can have; where one of them
    stays as it is, all do.  Raises ConfigError where that is not as asked and `strict` allows no fallback.
    """
    result = dict(plans)
    for unit in units:
        asked = {plans[key].scheme.weights for key in unit}
        if len(asked) < 2:
            continue
        common = _common_scheme([plans[key] for key in unit], layout)
        for key in unit:
            if plans[key].scheme.weights != common:
                changed = result[key] = _as_the_others(plans[key], common, [plans[key] for key in unit])
                if config.strict:
                    raise ConfigError(f"{changed.name}: {changed.reason}", hint="leave --strict out to allow this")
    return result


def _common_scheme(plans: Sequence[LayerPlan], layout: Layout) -> WeightScheme | None:
    schemes = {plan.scheme.weights for plan in plans}
    found = [scheme for scheme in schemes if scheme is not None]
    if len(found) < len(schemes):
        return None
    found.sort(key=lambda s: (-s.bits, -s.group_size if isinstance(s.group_size, int) else 0, str(s)))

    def fits(scheme: WeightScheme) -> bool:
        return all(layout.refusal(scheme, plan.out_features, plan.in_features) is None for plan in plans)

    return next((scheme for scheme in found if fits(scheme)), None)


def _as_the_others(plan: LayerPlan, scheme: WeightScheme | None, unit: Sequence[LayerPlan]) -> LayerPlan:
    if scheme is not None:
        reason = f"{scheme} instead of {plan.scheme.weights}: the experts of a layer share a grid"
        return plan.with_weights(scheme, reason)
    kept = next((other for other in unit if other.scheme.weights is None), None)
    why = f"{kept.name} stays as it is ({kept.reason})" if kept else "there is none that all of them can have"
    return plan.with_weights(None, f"the experts of a layer share a grid, and {why}")


def _on_one_grid(plans: list[LayerPlan], layout: Layout) -> list[LayerPlan]:
    """The plans with the grid that covers most weights; layers that fell back to another one stay as they are."""
    covered: dict[WeightScheme, int] = {}
    for plan in plans:
        if plan.scheme.weights is not None:
            covered[plan.scheme.weights] = covered.get(plan.scheme.weights, 0) + plan.weights
    if len(covered) < 2:
        return plans
    common = max(covered, key=lambda scheme: covered[scheme])
    reason = f"kept as it is: {layout.name} holds one grid for all layers, and most are {common}"
    return [plan if plan.scheme.weights in (None, common) else plan.with_weights(None, reason) for plan in plans]


def _plan(name: str, out_features: int, in_features: int, config: QuantConfig, layout: Layout) -> LayerPlan:
    asked = config.scheme_for(name)
    if asked is None:
        return LayerPlan(name, out_features, in_features, Scheme(), "skipped on request")
    impossible = layout.refusal(asked, 1024, 1024)
    if impossible:
        raise ConfigError(f"{layout.name} cannot hold {asked}, asked for {name}: {impossible}")
    candidates = [asked, *_smaller(asked, in_features)]
    refusals = []
    for scheme in candidates:
        refusal = layout.refusal(scheme, out_features, in_features)
        if refusal is None:
            break
        refusals.append(refusal)
    else:
        scheme = None
    if not refusals:
        return LayerPlan(name, out_features, in_features, Scheme(asked))
    outcome = f"{scheme.group_size} instead of {asked.group_size}" if scheme else "kept as it is"
    reason = f"{outcome}: {refusals[0] if scheme else refusals[-1]}"
    if config.strict:
        raise ConfigError(f"{name} ({out_features} x {in_features}): {reason}", hint="leave --strict out to allow this")
    return LayerPlan(name, out_features, in_features, Scheme(scheme), reason)


def _smaller(scheme: WeightScheme, in_features: int) -> list[WeightScheme]:
    """What to fall back to, best first: the smaller group sizes that divide, then one scale a row."""
    if not isinstance(scheme.group_size, int):
        return []
    sizes: list[GroupSize] = [
        size for size in reversed(GROUP_SIZES) if size < scheme.group_size and in_features % size == 0
    ]
    fallbacks: list[GroupSize] = [*sizes[:1], "channel"]
    return [dataclasses.replace(scheme, group_size=size) for size in fallbacks]
