"""Compare two models that were measured against the same original on the same texts: which one is closer?

Both models have good and bad documents in common, so the interval of the difference is much narrower than the
intervals of the two models suggest. Only the results of `measure` are needed, also from separate runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from llmq.errors import ConfigError
from llmq.evaluation.bootstrap import Interval, draws, interval_of_ratio
from llmq.evaluation.results import Documents, Measurement


@dataclass(frozen=True)
class PairedDifference:
    """The mean KL divergence of the model `second` minus that of the model `first`, in nats per token.

    text       the name of the text
    ratio      second / first; None if the first is 0
    intervals  of draws of documents, the same for both models; None if each text has only one document
    lower      the number of documents on which the second model has the lower mean KL
    higher     the number of documents on which it has the higher one; neither of the two counts ties
    documents  the number of documents
    unit       "documents", or "sequences" for a text without documents
    """

    text: str
    first: str
    second: str
    difference: float
    interval: Interval | None
    ratio: float | None
    ratio_interval: Interval | None
    lower: int
    higher: int
    documents: int
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `is_resolved`."""
        return {**asdict(self), "is_resolved": self.is_resolved}

    @property
    def is_resolved(self) -> bool:
        """Whether the interval excludes 0, so that other documents would hardly reverse the order of the two models."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def all_differences(measured: Mapping[str, Measurement]) -> list[PairedDifference]:
    """The differences of all pairs of models (name -> measurement): of each text, then of all texts together."""
    return [
        difference
        for (first, one), (second, other) in combinations(measured.items(), 2)
        for difference in differences(one, other, first, second)
    ]


def differences(
    one: Measurement, other: Measurement, first: str = "first", second: str = "second"
) -> list[PairedDifference]:
    """The differences of two models: of each text, then, if there are several, of all texts together.

    Raises ConfigError if the models were measured on other texts, or without an original.
    """
    pairs = list(_pairs(one, other))
    texts = [text for text, _, _ in pairs]
    results = [_difference([pair], text, first, second) for text, pair in zip(texts, pairs, strict=True)]
    if len(pairs) > 1:
        results.append(_difference(pairs, one.total.text, first, second))
    return results


Pair = tuple[str, Documents, Documents]


def _pairs(one: Measurement, other: Measurement) -> Iterator[Pair]:
    by_text = {figures.text: figures.documents for figures in other.texts}
    if set(by_text) != {figures.text for figures in one.texts}:
        raise ConfigError(
            f"one model was measured on {_listed(one)}, the other one on {_listed(other)}, expected the same texts",
            hint="measure both models in one command",
        )
    for figures in one.texts:
        ours, theirs = figures.documents, by_text[figures.text]
        if ours is None or theirs is None or ours.kl is None or theirs.kl is None:
            raise ConfigError("a paired difference needs an original to compare with", hint="add --against")
        if ours.tokens != theirs.tokens:
            raise ConfigError(
                f"{figures.text} has {ours} for one model and {theirs} for the other one, expected the same tokens",
                hint="measure both models in one command",
            )
        yield figures.text, ours, theirs


def _difference(pairs: Sequence[Pair], text: str, first: str, second: str) -> PairedDifference:
    tokens = _joined([ours.tokens for _, ours, _ in pairs])  # (D,)
    before = tokens * _joined([ours.kl or () for _, ours, _ in pairs])  # sums of each document, like the next
    after = tokens * _joined([theirs.kl or () for _, _, theirs in pairs])
    weights = draws([len(ours.tokens) for _, ours, _ in pairs])
    positive = bool(before.sum() > 0)
    return PairedDifference(
        text=text,
        first=first,
        second=second,
        difference=float((after - before).sum() / tokens.sum()),
        interval=interval_of_ratio(after - before, tokens, weights),
        ratio=float(after.sum() / before.sum()) if positive else None,
        ratio_interval=interval_of_ratio(after, before, weights) if positive else None,
        lower=int((after < before).sum()),
        higher=int((after > before).sum()),
        documents=len(tokens),
        unit=" and ".join(dict.fromkeys(ours.unit for _, ours, _ in pairs)),
    )


def _joined(parts: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for part in parts for value in part], dtype=torch.float64)


def _listed(measurement: Measurement) -> str:
    return ", ".join(figures.text for figures in measurement.texts)
