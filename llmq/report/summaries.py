"""The effect of each stage of a method on all layers or blocks."""

from collections.abc import Iterable

from llmq.report.record import BlockReport, LayerReport, StageGain, StageSummary


def of_layers(layers: Iterable[LayerReport]) -> list[StageSummary]:
    """The effect of own stage on all layers, in the order of the stages."""
    gains: dict[str, list[StageGain]] = {}
    places: dict[str, int] = {}  # a layer may have skipped the first stages
    for layer in layers:
        for place, gain in enumerate(layer.gains):
            gains.setdefault(gain.stage, []).append(gain)
            places[gain.stage] = max(place, places.get(gain.stage, 0))
    stages = []
    for stage in sorted(gains, key=places.__getitem__):
        own = gains[stage]
        before = sum(gain.before for gain in own)
        saved = sum(gain.before - gain.after for gain in own if gain.kept)
        kept = sum(gain.kept for gain in own)
        stages.append(StageSummary(stage, kept, len(own), -saved / before if before > 0 else 0.0))
    return stages


def of_blocks(blocks: Iterable[BlockReport]) -> list[StageSummary]:
    """The effect of own stage on all blocks; a transform may have several gains per block."""
    gains: dict[str, list[StageGain]] = {}
    for gain in (gain for block in blocks for gain in block.gains):
        gains.setdefault(gain.stage, []).append(gain)
    stages = []
    for stage, own in gains.items():
        changes = [gain.after / gain.before - 1 for gain in own if gain.kept]
        stages.append(StageSummary(stage, len(changes), len(own), sum(changes) / len(own), "blocks"))
    return stages
