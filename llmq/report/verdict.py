"""The verdict on a finished model: how far it is from the original on validation text, and what that means.

The rule has two parts.

**How close** follows from the mean KL divergence. Pinsker's inequality bounds what it can do: the probability of any
event of the next token changes by at most sqrt(KL / 2) on average. So `BANDS` are limits of this change: 5, 10 and 20
percentage points.

**Better than round to nearest (RTN) or not** follows from the interval of the ratio of the two KL divergences, over
the same documents. If the interval contains 1, the difference is not resolved.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BANDS = (  # the largest mean change of a probability, and the word for it
    (0.05, "very close to the original"),
    (0.10, "close to the original"),
    (0.20, "noticeably different from the original"),
    (math.inf, "far from the original"),
)


@dataclass(frozen=True)
class Continuation:
    """A prompt, and the most likely continuations by the original and by the quantized model."""

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True)
class Verdict:
    """The quality of a finished model on validation text; `notes` says why if nothing was measured.

    sentence          what is good and what is bad, for people
    kl                mean KL(original ‖ quantized) in nats per token; None if nothing was measured
    kl_interval       95 % bootstrap interval over documents; None if there is one document
    kl_rtn            the same for round to nearest (RTN) with the same grids; None if it was not measured
    rtn_ratio_interval  95 % interval of kl / kl_rtn over the same documents
    perplexity_float  of the original
    same_top1         fraction of the positions where both models have the same most likely token
    tokens            number of tokens of the validation text
    text              what the validation text is
    measured          the format of the files that were measured; others of the run hold the same quantized values
    continuations     of a few prompts, if both models fit into memory
    """

    sentence: str
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    kl_rtn: float | None = None
    rtn_ratio_interval: tuple[float, float] | None = None
    perplexity_float: float | None = None
    perplexity: float | None = None
    same_top1: float | None = None
    same_top1_rtn: float | None = None
    tokens: int = 0
    text: str = ""
    measured: str = ""
    seconds: float = 0.0
    continuations: tuple[Continuation, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        changed: dict[str, Any] = {"notes": tuple(values["notes"])}
        changed["continuations"] = tuple(Continuation(**entry) for entry in values["continuations"])
        for interval in ("kl_interval", "rtn_ratio_interval"):
            changed[interval] = None if values[interval] is None else tuple(values[interval])
        return cls(**{**values, **changed})


def change(kl: float) -> float:
    """The largest mean change of a probability of the next token that a mean KL divergence allows, at most 1."""
    return min(1.0, math.sqrt(max(0.0, kl) / 2))


def sentence(
    kl: float, same_top1: float, kl_rtn: float | None, rtn_ratio_interval: tuple[float, float] | None, *, is_rtn: bool
) -> str:
    """What is good and what is bad about a model, by the rule at the top of this page."""
    words = next(words for limit, words in BANDS if change(kl) <= limit)
    start = (
        f"The model is {words}: KL {kl:.4f} nats per token, the same most likely token at {same_top1:.1%} of positions"
    )
    if is_rtn:
        return f"{start}. It is round to nearest (RTN) itself: methods with calibration text come closer."
    if kl_rtn is None or kl_rtn == 0:
        return f"{start}."
    return f"{start}. {compared(kl / kl_rtn, rtn_ratio_interval)}"


def compared(ratio: float, interval: tuple[float, float] | None) -> str:
    """How the KL compares with that of RTN, as a sentence; `ratio` is kl / kl_rtn."""
    low, high = interval or (ratio, ratio)
    if high < 1:
        return f"Its KL is {1 - ratio:.0%} below that of round to nearest (RTN)."
    if low > 1:
        return f"Its KL is {ratio - 1:.0%} above that of round to nearest (RTN): use more or other calibration text."
    return "It is not measurably better than round to nearest (RTN): use more or other calibration text."
