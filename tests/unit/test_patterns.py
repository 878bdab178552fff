"""Patterns over module names: what they match, what is refused, and how long they may take."""

import time

import pytest

from llmq.errors import ConfigError, FormatError
from llmq.formats import compressed_tensors, gptq
from llmq.formats.read_only import auto_round
from llmq.patterns import SECONDS, Pattern, matches, require_pattern

NAME = "model.layers.0.self_attn.q_proj"
ENDLESS = "((?:[a-z._0-9]){1,30}){1,30}[?!]"  # exponential in the length of a name
GRID = {"bits": 4, "group_size": 32}


def test_regular_expressions_match_at_the_start_or_anywhere() -> None:
    assert Pattern("model.*q_proj").match(NAME)
    assert not Pattern("q_proj").match(NAME)
    assert Pattern("q_proj").search(NAME)
    assert Pattern("(?!.*visual).*q_proj").match(NAME)


@pytest.mark.parametrize(
    "text", ["(", "*", "x{9999999999999999999999}", "(" * 5000 + ")" * 5000], ids=lambda text: text[:9]
)
def test_invalid_expression_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="expected a regular expression"):
        Pattern(text)
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        require_pattern(f"re:{text}")


def test_expression_that_takes_exponential_time_is_refused() -> None:
    start = time.process_time()
    with pytest.raises(FormatError, match="takes more than"):
        Pattern(ENDLESS).match(NAME * 3)
    with pytest.raises(ConfigError, match="takes more than"):
        matches(f"re:{ENDLESS}", NAME * 3)
    assert time.process_time() - start < 3 * SECONDS


def test_limit_is_for_all_names_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pattern("q_proj")
    clock = iter(0.3 * number for number in range(100))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    assert [pattern.search(NAME) for _ in range(3)] == [True] * 3
    with pytest.raises(FormatError, match="takes more than"):
        pattern.search(NAME)


@pytest.mark.parametrize(
    ("read_config", "settings"),
    [
        (compressed_tensors.read_config, {"config_groups": {}, "ignore": [f"re:{ENDLESS}"]}),
        (gptq.read_config, {**GRID, "dynamic": {f"-:{ENDLESS}": {}}}),
        (auto_round.read_config, {**GRID, "modules_to_not_convert": [ENDLESS]}),
        (auto_round.read_config, {**GRID, "extra_config": {ENDLESS: {}}}),
    ],
)
def test_no_format_matches_for_longer(read_config, settings, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("llmq.patterns.SECONDS", 0.05)
    with pytest.raises(FormatError, match="takes more than"):
        read_config(settings)(NAME * 3)


def test_auto_round_compares_an_invalid_expression_as_a_name() -> None:
    read = auto_round.read_config({**GRID, "modules_to_not_convert": ["a.(b"]})
    assert read("a.(b") is None
    assert read("a.b") is not None
