"""Scores of a model, and its distance from an original: perplexity, KL divergence, agreement.

**Perplexity** follows the protocol of the published WikiText figures: the rows of the text are joined with blank lines,
tokenized once, and cut into sequences that do not overlap. It is exp of the mean negative log-likelihood of every token
of a sequence except the first. Texts that consist of documents (.jsonl) are packed like calibration text instead: each
document is tokenized separately, with a beginning-of-text token.

**KL divergence** is KL(original ‖ quantized) in nats over the whole vocabulary, for every position. It distinguishes
methods that perplexity cannot: a lower perplexity than the original's is a change, too.

**RMS Δp** is sqrt(mean((p − p₀)²)), where p and p₀ are the probabilities that the model and the original give to the
correct next token. llama.cpp's perplexity tool uses the same name. Here it is a fraction, not per cent, and includes
every token of a sequence except the first; that tool skips the first half of each sequence.

**Intervals** contain 95 % of 1000 bootstrap draws (basic percentiles). Tokens of a sequence depend on each other, so
whole sequences are drawn, from each text as many as it has. Both models are evaluated on the same draws, so the
interval of a perplexity ratio is narrower than those of the two perplexities.
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
ENTRIES_AT_ONCE = 2**24  # entries of logits that are compared together in float32, to limit memory
HUB_ROWS = 50_000  # the most rows of a Hub data set, including blank ones; the test text of WikiText-2 has 4358
DRAWS, SEED = 1000, 0


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model over `tokens` predicted tokens; all except the perplexity need an original to compare with.

    The KL is in nats per token, `same_top_1` and `rms_dp` are fractions, `perplexity_ratio` is relative to the
    original. An interval is None if each text has only one sequence, or if a figure is infinite.
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
    """The comparison with the original for each token of S sequences, on the CPU."""

    divergence: Tensor  # (S, T) float32, KL in nats
    agreement: Tensor  # (S, T) bool: both models have the same most likely token
    original_loss: Tensor  # (S, T - 1) float32, negative log-likelihood in nats


@dataclass(frozen=True)
class Scores:
    """The loss of each token of S sequences except the first, and the comparison with the original if there is one."""

    loss: Tensor  # (S, T - 1) float32, negative log-likelihood in nats
    comparison: Comparison | None = None

    def __getitem__(self, windows: slice) -> "Scores":
        if self.comparison is None:
            return Scores(self.loss[windows])
        compared = self.comparison
        return Scores(
            self.loss[windows],
            Comparison(compared.divergence[windows], compared.agreement[windows], compared.original_loss[windows]),
        )

    @staticmethod
    def joined(parts: Sequence["Scores"]) -> "Scores":
        """The scores of the sequences of all parts, one after the other."""
        loss = torch.cat([part.loss for part in parts])
        compared = [part.comparison for part in parts if part.comparison is not None]
        if not compared:
            return Scores(loss)
        return Scores(
            loss,
            Comparison(
                torch.cat([comparison.divergence for comparison in compared]),
                torch.cat([comparison.agreement for comparison in compared]),
                torch.cat([comparison.original_loss for comparison in compared]),
            ),
        )


def read_windows(
    source: str, tokenizer: Any, seqlen: int, *, wikitext: bool = False, limit: int | None = None
) -> Tensor:
    """(S, seqlen) int64 sequences of an evaluation text: any source of `--calibration` except `self`.

    `wikitext` treats the lines of a .txt file as the rows of the WikiText data set: blank lines are emptied, and all
    are joined with blank lines. The rows of a Hub data set are always joined in this way.
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
            f"{source} holds {len(ids)} tokens, fewer than one sequence of {seqlen}", hint="lower --seqlen"
        )
    return windows


def wikitext_rows(text: str) -> str:
    """The raw WikiText file like the joined rows of the data set: blank lines emptied, rows joined with blank lines."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))  # a line ends with "\n" only


@torch.no_grad()
def score(predicted: Tensor, tokens: Tensor, expected: Tensor | None = None) -> Scores:
    """The scores of `tokens` (B, T) from the logits (B, T, V) of a model, compared with the original's if given.

    This allocates a few copies of `ENTRIES_AT_ONCE` logits.
    """
    vocabulary, shape = predicted.shape[-1], tokens.shape
    if expected is not None and expected.shape != predicted.shape:
        raise UnsupportedModelError(
            f"the models have vocabularies of {vocabulary} and {expected.shape[-1]} tokens, expected the same",
            hint="compare a model with the model from which it was made",
        )
    rows = max(1, ENTRIES_AT_ONCE // vocabulary)
    following = tokens.roll(-1, dims=1).flatten().to(predicted.device).split(rows)  # the last of a sequence is dropped
    losses, original_losses, divergences, agreements = [], [], [], []
    flat = predicted.reshape(-1, vocabulary).split(rows)
    flat_expected = [None] * len(flat) if expected is None else expected.reshape(-1, vocabulary).split(rows)
    for logits, original_logits, token in zip(flat, flat_expected, following, strict=True):
        logp = torch.log_softmax(logits.to(torch.float32), dim=-1)
        losses.append(-logp.gather(-1, token[:, None])[:, 0].cpu())
        if original_logits is not None:
            logp_0 = torch.log_softmax(original_logits.to(torch.float32), dim=-1)
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
    """The figures of a model; `sizes` are the numbers of sequences of each text, by default all are of one text.

    Raises UnsupportedModelError if logits of the model are NaN or infinite.
    """
    weights = draws(sizes or [len(scores.loss)])
    # One value per sequence, (S,): all have the same length, so the mean of their means is the mean over all tokens.
    loss = _finite(scores.loss.double(), "model").mean(1)
    perplexity, around = _exp(loss.mean()), _interval(loss, weights, _exp)
    if scores.comparison is None:
        return Evaluation(scores.loss.numel(), perplexity, around)
    compared = scores.comparison
    rise = loss - _finite(compared.original_loss.double(), "original").mean(1)
    moved = ((-scores.loss.double()).exp() - (-compared.original_loss.double()).exp()).square().mean(1)
    same, kl = compared.agreement.double().mean(1), compared.divergence.double()
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
    """The figures of the original, if the scores include a comparison."""
    return None if scores.comparison is None else summary(Scores(scores.comparison.original_loss), sizes)


def draws(sizes: Sequence[int]) -> Tensor:
    """(DRAWS, S) float64 weights, each row with the sum 1: how often each sequence is drawn, text by text."""
    generator = np.random.default_rng(SEED)
    counts = [generator.multinomial(size, np.full(size, 1 / size), size=DRAWS) for size in sizes]
    return torch.from_numpy(np.concatenate(counts, axis=1) / sum(sizes))


def batches(windows: Tensor) -> Sequence[Tensor]:
    """`windows` (S, T) in parts of about `TOKENS_PER_BATCH_TO_EVALUATE` tokens."""
    parts: tuple[Tensor, ...] = windows.split(windows_per_batch(windows))
    return parts


def windows_per_batch(windows: Tensor) -> int:
    """The number of sequences, of `windows` (S, T), that run together."""
    return max(1, memory.TOKENS_PER_BATCH_TO_EVALUATE // windows.shape[1])


def _finite(loss: Tensor, whose: str) -> Tensor:
    if not bool(torch.isfinite(loss).all()):
        raise UnsupportedModelError(
            f"the {whose}'s logits are NaN or infinite, expected finite values",
            hint="the checkpoint is damaged; get another copy",
        )
    return loss


def _exp(value: Tensor | float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _interval(values: Tensor, weights: Tensor, then: Callable[[float], float] = float) -> Interval | None:
    """The interval with 95 % of the draws of the mean of `values` (S,), transformed by an increasing function."""
    if bool((weights == weights[0]).all()) or not bool(torch.isfinite(values).all()):
        return None
    low, high = torch.quantile(weights @ values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return then(low), then(high)


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
