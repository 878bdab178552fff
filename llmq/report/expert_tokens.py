"""How many calibration tokens the experts of a mixture saw: an expert that sees few is quantized less reliably."""

import re
import statistics
from collections.abc import Iterable, Sequence

from llmq.report.record import ExpertTokens, LayerReport

_NUMBER = re.compile(r"(.*)\.(\d+)(?=\.|$)")  # the number of an expert is the last number in the name of a layer


def expert_tokens(layers: Iterable[LayerReport]) -> list[ExpertTokens]:
    """One entry per layer of experts; none without experts or without calibration text."""
    by_place: dict[str, dict[int, list[LayerReport]]] = {}
    for layer in layers:
        match = _NUMBER.match(layer.name)
        if layer.expert and match is not None:
            by_place.setdefault(match[1], {}).setdefault(int(match[2]), []).append(layer)
    counted = (_counted(place, list(experts.values())) for place, experts in by_place.items())
    return [entry for entry in counted if entry.maximum or entry.under_sampled]


def _counted(place: str, experts: Sequence[Sequence[LayerReport]]) -> ExpertTokens:
    tokens = [max(part.tokens for part in parts) for parts in experts]
    return ExpertTokens(
        place,
        experts=len(tokens),
        minimum=min(tokens),
        median=float(statistics.median(tokens)),
        maximum=max(tokens),
        under_sampled=sum(any(part.borrowed for part in parts) for parts in experts),
    )


def summary(entries: Sequence[ExpertTokens]) -> str | None:
    """The calibration tokens of all experts in one sentence; None without experts."""
    if not entries:
        return None
    experts, padded = sum(entry.experts for entry in entries), sum(entry.under_sampled for entry in entries)
    note = f"; {padded} of {experts} experts saw too few and were padded with other tokens" if padded else ""
    median = statistics.median(entry.median for entry in entries)
    return f"each saw at least {min(entry.minimum for entry in entries)} tokens, {median:g} in the median{note}"
