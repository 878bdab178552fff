"""The figures of a model on a text, from the scores of all tokens: means with intervals, and quantiles.

**Perplexity** is exp of the mean negative log-likelihood of every token of a sequence except the first.

**Quantiles** of the KL divergence are over all tokens, with `kl_max` for the worst one. They have no interval.

**RMS Δp** is sqrt(mean((p − p₀)²)), where p and p₀ are the probabilities that the model and the original give to the
correct next token. llama.cpp's perplexity tool uses the same name. Here it is a fraction, not per cent, and includes
every token of a sequence except the first; that tool skips the first half of each sequence.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import UnsupportedModelError
from llmq.evaluation.bootstrap import Bootstrap, Interval
from llmq.evaluation.scoring import Scores


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model over `tokens` predicted tokens; all except the perplexity need an original to compare with.

    The KL is in nats per token, `same_top_1` and `rms_dp` are fractions, `perplexity_ratio` is relative to the
    original. An interval is None if each text has only one document, or if a figure is infinite.
    """

    tokens: int
    perplexity: float
    perplexity_interval: Interval | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: Interval | None = None
    kl_mean: float | None = None
    kl_mean_interval: Interval | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    kl_999: float | None = None
    kl_max: float | None = None
    same_top_1: float | None = None
    same_top_1_interval: Interval | None = None
    rms_dp: float | None = None
    rms_dp_interval: Interval | None = None


def summary(scores: Scores, bootstrap: Bootstrap | None = None) -> Evaluation:
    """The figures of a model; by default each sequence is a document, and all are of one text.

    Raises UnsupportedModelError if logits of the model are NaN or infinite.
    """
    S, predicted = scores.loss.shape
    bootstrap = bootstrap or Bootstrap([torch.arange(S)[:, None].expand(S, predicted + 1)])
    loss = _finite(scores.loss.double(), "model")  # (S, T - 1)
    perplexity, around = _exp(loss.mean()), bootstrap.interval(loss, _exp)
    if scores.comparison is None:
        return Evaluation(loss.numel(), perplexity, around)
    compared = scores.comparison
    rise = loss - _finite(compared.original_loss.double(), "original")
    moved = ((-loss).exp() - (-compared.original_loss.double()).exp()).square()
    same, kl = compared.agreement.double(), compared.divergence.double()  # (S, T)
    ordered = kl.flatten().sort().values

    def at(share: float) -> float:
        return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

    return Evaluation(
        tokens=loss.numel(),
        perplexity=perplexity,
        perplexity_interval=around,
        perplexity_ratio=_exp(rise.mean()),
        perplexity_ratio_interval=bootstrap.interval(rise, _exp),
        kl_mean=kl.mean().item(),
        kl_mean_interval=bootstrap.interval(kl),
        kl_median=at(0.5),
        kl_99=at(0.99),
        kl_999=at(0.999),
        kl_max=at(1.0),
        same_top_1=same.mean().item(),
        same_top_1_interval=bootstrap.interval(same),
        rms_dp=math.sqrt(moved.mean()),
        rms_dp_interval=bootstrap.interval(moved, math.sqrt),
    )


def summary_of_original(scores: Scores, bootstrap: Bootstrap | None = None) -> Evaluation | None:
    """The figures of the original, if the scores include a comparison."""
    return None if scores.comparison is None else summary(Scores(scores.comparison.original_loss), bootstrap)


def _finite(loss: Tensor, whose: str) -> Tensor:
    if not bool(torch.isfinite(loss).all()):
        raise UnsupportedModelError(
            f"the {whose}'s logits are NaN or infinite, expected finite values",
            hint="the checkpoint is damaged; get another copy",
        )
    return loss


def _exp(value: Tensor | float) -> float:
    return math.exp(value) if value < 700 else math.inf
