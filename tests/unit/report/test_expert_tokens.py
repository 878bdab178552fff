"""The calibration tokens per expert: minimum, median, maximum and under-sampled experts of each layer."""

import pytest

from llmq.report.expert_tokens import expert_tokens, summary
from llmq.report.record import ExpertTokens, LayerReport

PARTS = ("gate_proj", "up_proj", "down_proj")


def layer(name: str, tokens: int, borrowed: int = 0, *, expert: bool = True) -> LayerReport:
    return LayerReport(name, "int4 g16 symmetric", 4.5, 0.1, 0.1, tokens, borrowed=borrowed, expert=expert)


def experts(block: int, tokens: dict[int, int], padded: int | None = None) -> list[LayerReport]:
    return [
        layer(f"model.layers.{block}.mlp.experts.{e}.{part}", count, borrowed=9 * (e == padded and part == "down_proj"))
        for e, count in tokens.items()
        for part in PARTS
    ]


def test_one_entry_per_layer_of_experts() -> None:
    other = layer("model.layers.0.self_attn.q_proj", 100, expert=False)
    reports = [other, *experts(0, {0: 7, 1: 30, 2: 63, 3: 100}), *experts(2, {0: 0, 1: 50, 2: 150}, padded=0)]
    assert expert_tokens(reports) == [
        ExpertTokens("model.layers.0.mlp.experts", experts=4, minimum=7, median=46.5, maximum=100, under_sampled=0),
        ExpertTokens("model.layers.2.mlp.experts", experts=3, minimum=0, median=50.0, maximum=150, under_sampled=1),
    ]


def test_summary_names_under_sampled_experts() -> None:
    entries = expert_tokens([*experts(0, {0: 7, 1: 30}), *experts(1, {0: 0, 1: 50}, padded=0)])
    assert summary(entries) == (
        "each saw at least 0 tokens, 21.75 in the median; 1 of 4 experts saw too few and were padded with other tokens"
    )
    assert summary(expert_tokens(experts(0, {0: 7}))) == "each saw at least 7 tokens, 7 in the median"


@pytest.mark.parametrize("reports", [[], [layer("model.layers.0.mlp.up_proj", 50, expert=False)], experts(0, {0: 0})])
def test_nothing_without_experts_or_text(reports: list[LayerReport]) -> None:
    assert expert_tokens(reports) == [] and summary(expert_tokens(reports)) is None
