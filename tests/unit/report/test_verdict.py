"""The rule for the sentence of a verdict."""

import dataclasses
import json

import pytest

from llmq.report.verdict import Continuation, Verdict, change, compared, sentence


@pytest.mark.parametrize(
    ("kl", "words"),
    [
        (0.0, "very close"),
        (0.005, "very close"),
        (0.006, "is close"),
        (0.02, "is close"),
        (0.021, "noticeably different"),
        (0.08, "noticeably different"),
        (0.081, "far from"),
        (50.0, "far from"),
    ],
)
def test_bands_are_limits_of_the_change_of_a_probability(kl: float, words: str) -> None:
    assert words in sentence(kl, 0.9, None, None, is_rtn=False)
    assert change(kl) == pytest.approx(min(1.0, (kl / 2) ** 0.5))


@pytest.mark.parametrize(
    ("ratio", "interval", "words"),
    [
        (0.6, (0.5, 0.7), "40% below"),
        (0.9, (0.8, 1.1), "not measurably better"),
        (1.1, (0.8, 1.3), "not measurably better"),
        (1.5, (1.2, 1.9), "50% above"),
        (0.6, None, "40% below"),
        (1.0, None, "not measurably better"),
    ],
)
def test_the_comparison_with_rtn_follows_from_the_interval(
    ratio: float, interval: tuple[float, float] | None, words: str
) -> None:
    assert words in compared(ratio, interval)


def test_rtn_is_not_compared_with_itself() -> None:
    assert "RTN) itself" in sentence(0.1, 0.9, 0.1, None, is_rtn=True)


def test_a_verdict_is_the_same_after_json() -> None:
    verdict = Verdict(
        "a sentence", kl=0.1, kl_interval=(0.05, 0.2), continuations=(Continuation("a", "b", "c"),), notes=("n",)
    )
    assert Verdict.from_dict(json.loads(json.dumps(dataclasses.asdict(verdict)))) == verdict
