"""How good a model is, and how far from another: perplexity, KL divergence, agreement.

**Perplexity** follows the protocol behind the published WikiText figures: the rows of the text joined with blank lines,
tokenized once, cut into windows that do not overlap; exp of the mean negative log-likelihood of every token of a
window but its first.  Texts made of documents (.jsonl) are packed like calibration text instead: each tokenized on its
own, with its beginning-of-text token.

**KL divergence**, KL(original ‖ quantized) in nats over the whole vocabulary for every position, tells methods apart
where perplexity cannot: a lower perplexity than the original's is a change too.

**RMS Δp** is sqrt(mean((p − p₀)²)), p and p₀ being the probabilities that the model and the original give to the token
that really comes next: what llama.cpp's perplexity tool calls so, here a fraction and not per cent, and over every
token of a window but its first where that tool skips the first half of each.

**Intervals** hold 95 % of 1000 bootstrap draws, basic percentiles.  Tokens of a window depend on each other, so whole
windows are drawn, as many from each text as it has; both models are drawn on the same windows, so a ratio of
perplexities has a narrower interval than the two of which it is made.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq import calibration, memory
from llmq.algorithms.kl_divergence import kl_divergence
from llmq.errors import CalibrationError, UnsupportedModelError

Interval = tuple[float, float]
ENTRIES_AT_ONCE = 2**24  # of logits that are compared, in float32: what holds a few copies of them
HUB_ROWS = 50_000  # of a data set, blank ones too; WikiText-2's test text has 4358
DRAWS, SEED = 1000, 0


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model over `tokens` predicted tokens; all but the perplexity need an original to compare with.

    KL in nats per token, `same_top_1` and `rms_dp` as fractions, `perplexity_ratio` to the original's.  An interval is
    None where each text is one window, or a figure is infinite.
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
    same_top_1: float | None = None
    same_top_1_interval: Interval | None = None
    rms_dp: float | None = None
    rms_dp_interval: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """What is known of each token, float32 on the CPU, window by window."""

    divergence: Tensor  # (S, T) in nats
    agreement: Tensor  # (S, T) bool: both models hold the same token for the likeliest
    original_loss: Tensor  # (S, T - 1)


@dataclass(frozen=True)
class Scores:
    """The loss of each token of S windows but their first, and how the original fares there."""

    loss: Tensor  # (S, T - 1) float32, negative log-likelihood in nats
    beside: Comparison | None = None

    def __getitem__(self, windows: slice) -> "Scores":
        if self.beside is None:
            return Scores(self.loss[windows])
        found = self.beside
        return Scores(
            self.loss[windows],
            Comparison(found.divergence[windows], found.agreement[windows], found.original_loss[windows]),
        )

    @staticmethod
    def joined(parts: Sequence["Scores"]) -> "Scores":
        """The windows of all parts, one after the other."""
        loss = torch.cat([part.loss for part in parts])
        compared = [part.beside for part in parts if part.beside is not None]
        if not compared:
            return Scores(loss)
        return Scores(
            loss,
            Comparison(
                torch.cat([each.divergence for each in compared]),
                torch.cat([each.agreement for each in compared]),
                torch.cat([each.original_loss for each in compared]),
            ),
        )


def read_windows(
    source: str, tokenizer: Any, seqlen: int, *, wikitext: bool = False, limit: int | None = None
) -> Tensor:
    """(S, seqlen) int64 windows of an evaluation text: any source of `--calibration` but `self`.

    `wikitext` treats the lines of a .txt file as the rows of the WikiText data set: blank lines are emptied, all are
    joined with blank lines.  The rows of a Hub data set are always joined in this way.
    """
    contents = calibration.read_source(source, limit=HUB_ROWS)
    texts = calibration.texts_only(contents.documents, source)
    if contents.continuous:
        text = "\n\n".join(texts)
        ids = _tokenize(wikitext_rows(text) if wikitext and Path(source).is_file() else text, tokenizer)
    else:
        ids = [token for text in texts if text.strip() for token in _tokenize(text, tokenizer)]
    windows = calibration.cut(torch.tensor(ids, dtype=torch.int64), seqlen)[:limit]
    if len(windows) == 0:
        raise CalibrationError(
            f"{source} holds {len(ids)} tokens, fewer than one window of {seqlen}", hint="lower --seqlen"
        )
    return windows


def wikitext_rows(text: str) -> str:
    """The raw WikiText file as the data set's rows give it: blank lines emptied, rows joined with blank lines."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))  # a line ends with "\n" only


@torch.no_grad()
def score(predicted: Tensor, tokens: Tensor, expected: Tensor | None = None) -> Scores:
    """Each token's figures from the logits (B, T, V) of a model, and from those of the original, for `tokens` (B, T).

    A few copies of `ENTRIES_AT_ONCE` logits are made beyond what is given.
    """
    vocabulary, shape = predicted.shape[-1], tokens.shape
    if expected is not None and expected.shape != predicted.shape:
        raise UnsupportedModelError(
            f"the models have vocabularies of {vocabulary} and {expected.shape[-1]} tokens",
            hint="compare a model with the one that it was made from",
        )
    rows = max(1, ENTRIES_AT_ONCE // vocabulary)
    following = tokens.roll(-1, dims=1).flatten().to(predicted.device).split(rows)  # the last of a window has none
    losses, original_losses, divergences, agreements = [], [], [], []
    flat = predicted.reshape(-1, vocabulary).split(rows)
    others = [None] * len(flat) if expected is None else expected.reshape(-1, vocabulary).split(rows)
    for mine, theirs, token in zip(flat, others, following, strict=True):
        logp = torch.log_softmax(mine.to(torch.float32), dim=-1)
        losses.append(-logp.gather(-1, token[:, None])[:, 0].cpu())
        if theirs is not None:
            logp_0 = torch.log_softmax(theirs.to(torch.float32), dim=-1)
            original_losses.append(-logp_0.gather(-1, token[:, None])[:, 0].cpu())
            divergences.append(kl_divergence(logp_0, logp).clamp(min=0).cpu())
            agreements.append((logp_0.argmax(-1) == logp.argmax(-1)).cpu())

    def windows(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).reshape(shape)

    loss = windows(losses)[:, :-1]
    if expected is None:
        return Scores(loss)
    return Scores(loss, Comparison(windows(divergences), windows(agreements), windows(original_losses)[:, :-1]))


def summary(scores: Scores, sizes: Sequence[int] | None = None) -> Evaluation:
    """The figures of a model; `sizes` says how many windows are of each text, by default all are of one.

    Raises UnsupportedModelError where the model's logits are no numbers.
    """
    weights = draws(sizes or [len(scores.loss)])
    # One figure a window, (S,): windows are of one length, so the mean of their means is that of all tokens.
    loss = _finite(scores.loss.double(), "model").mean(1)
    perplexity, around = _exp(loss.mean()), _interval(loss, weights, _exp)
    if scores.beside is None:
        return Evaluation(scores.loss.numel(), perplexity, around)
    found = scores.beside
    rise = loss - _finite(found.original_loss.double(), "original").mean(1)
    moved = ((-scores.loss.double()).exp() - (-found.original_loss.double()).exp()).square().mean(1)
    same, kl = found.agreement.double().mean(1), found.divergence.double()
    ordered = kl.flatten().sort().values

    def at(share: float) -> float:
        return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

    return Evaluation(
        tokens=scores.loss.numel(),
        perplexity=perplexity,
        perplexity_interval=around,
        perplexity_ratio=_exp(rise.mean()),
        perplexity_ratio_interval=_interval(rise, weights, _exp),
        kl_mean=kl.mean().item(),
        kl_mean_interval=_interval(kl.mean(1), weights),
        kl_median=at(0.5),
        kl_99=at(0.99),
        kl_999=at(0.999),
        same_top_1=same.mean().item(),
        same_top_1_interval=_interval(same, weights),
        rms_dp=math.sqrt(moved.mean()),
        rms_dp_interval=_interval(moved, weights, math.sqrt),
    )


def summary_of_original(scores: Scores, sizes: Sequence[int] | None = None) -> Evaluation | None:
    """The original's own figures, where scores hold it."""
    return None if scores.beside is None else summary(Scores(scores.beside.original_loss), sizes)


def draws(sizes: Sequence[int]) -> Tensor:
    """(DRAWS, S) float64 weights, each row summing to 1: how often each window is drawn, text by text."""
    generator = np.random.default_rng(SEED)
    counts = [generator.multinomial(size, np.full(size, 1 / size), size=DRAWS) for size in sizes]
    return torch.from_numpy(np.concatenate(counts, axis=1) / sum(sizes))


def batches(windows: Tensor) -> Sequence[Tensor]:
    """`windows` (S, T) in parts of about `TOKENS_PER_BATCH_TO_EVALUATE` tokens."""
    parts: tuple[Tensor, ...] = windows.split(windows_per_batch(windows))
    return parts


def windows_per_batch(windows: Tensor) -> int:
    """How many of the `windows` (S, T) run together."""
    return max(1, memory.TOKENS_PER_BATCH_TO_EVALUATE // windows.shape[1])


def _finite(loss: Tensor, whose: str) -> Tensor:
    if not bool(torch.isfinite(loss).all()):
        raise UnsupportedModelError(f"the {whose}'s logits are NaN or infinite", hint="the checkpoint is damaged")
    return loss


def _exp(value: Tensor | float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _interval(values: Tensor, weights: Tensor, then: Callable[[float], float] = float) -> Interval | None:
    """Where 95 % of the draws of the mean of `values` (S,) lie, seen through a rising function."""
    if bool((weights == weights[0]).all()) or not bool(torch.isfinite(values).all()):
        return None
    low, high = torch.quantile(weights @ values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return then(low), then(high)


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
