"""Perplexity and divergence, compared with loops over single tokens in float64, and their intervals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq import memory
from llmq.evaluation import scoring
from llmq.evaluation.bootstrap import Bootstrap, Interval
from llmq.evaluation.scoring import Comparison, Scores, score
from llmq.evaluation.summary import Evaluation, summary, summary_of_original

VOCABULARY = 40
EPSILON = 2.0**-23  # of float32

Logits = Callable[[Tensor], Tensor]  # (B, T) int64 -> (B, T, V) float32


def bigrams(seed: int, spread: float = 2.0) -> Tensor:
    """(V, V) logits of the next token by the previous token."""
    return spread * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def model(table: Tensor) -> Logits:
    return lambda tokens: table[tokens]


def windows(S: int = 5, T: int = 24) -> Tensor:
    return torch.randint(0, VOCABULARY, (S, T), generator=torch.Generator().manual_seed(9))


def evaluate(logits: Logits, tokens: Tensor, *, against: Logits | None = None) -> Evaluation:
    """The metrics from the logits of all `tokens` (S, T) at once."""
    return summary(score(logits(tokens), tokens, None if against is None else against(tokens)))


def log_softmax(logits: Tensor) -> NDArray[np.float64]:
    values = logits.double().numpy()
    highest = values.max(-1, keepdims=True)
    return values - highest - np.log(np.exp(values - highest).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def perplexity_by_hand(logits: Logits, tokens: Tensor) -> float:
    """Over all tokens of a sequence except the first, one sequence at a time."""
    total, count = 0.0, 0
    for window in tokens:
        predicted = log_softmax(logits(window[None]))[0]
        for position in range(len(window) - 1):
            total -= predicted[position, int(window[position + 1])]
            count += 1
    return math.exp(total / count)


# ---- metrics


def test_perplexity_equals_that_of_a_plain_loop() -> None:
    actual = evaluate(model(bigrams(0)), windows())
    assert actual.tokens == 5 * 23
    # A log-probability of up to 20 has a relative error of a few epsilons, and so has the perplexity.
    assert actual.perplexity == pytest.approx(perplexity_by_hand(model(bigrams(0)), windows()), rel=100 * EPSILON)
    assert actual.kl_mean is None and actual.same_top_1 is None


def test_uniform_guessing_has_the_perplexity_of_the_vocabulary() -> None:
    assert evaluate(model(torch.zeros(VOCABULARY, VOCABULARY)), windows()).perplexity == pytest.approx(VOCABULARY)


def test_overflowing_perplexity_is_infinite() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, 0] = 1e6
    assert evaluate(model(table), windows()).perplexity == math.inf


def test_divergence_equals_that_of_a_plain_loop() -> None:
    original, quantized, tokens = bigrams(0), bigrams(0) + 0.3 * bigrams(1), windows()
    actual = evaluate(model(quantized), tokens, against=model(original))
    p, q = log_softmax(original[tokens]), log_softmax(quantized[tokens])
    divergences = (np.exp(p) * (p - q)).sum(-1).flatten()  # (S * T,), including the last position of a sequence
    # A sum in float32 of terms of both signs, of the size of a log-probability times its probability.
    tolerance = 100 * EPSILON * float((np.exp(p) * (np.abs(p) + np.abs(q))).sum(-1).max())
    assert actual.kl_mean == pytest.approx(divergences.mean(), abs=tolerance)
    assert actual.kl_median == pytest.approx(np.quantile(divergences, 0.5, method="higher"), abs=tolerance)
    assert actual.kl_99 == pytest.approx(np.sort(divergences)[int(0.99 * len(divergences))], abs=tolerance)
    assert actual.same_top_1 == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))
    assert np.median(divergences) < divergences.mean() < divergences.max()  # so that no two metrics are equal


def test_quantiles_are_over_all_tokens() -> None:
    kl = torch.randperm(2000, generator=torch.Generator().manual_seed(5)).reshape(50, 40).float()
    actual = summary(Scores(torch.zeros(50, 39), Comparison(kl, kl > 0, torch.zeros(50, 39))))
    assert (actual.kl_median, actual.kl_99, actual.kl_999, actual.kl_max) == (1000, 1980, 1998, 1999)


def test_divergence_is_from_the_original() -> None:
    """If only the original is certain, the divergence is large; the other way round it is small."""
    sure, unsure = bigrams(0, spread=8.0), bigrams(0, spread=0.1)
    p, q = log_softmax(sure), log_softmax(unsure)
    tokens = torch.arange(VOCABULARY)[None]
    assert evaluate(model(unsure), tokens, against=model(sure)).kl_mean == pytest.approx(
        (np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4
    )


def test_model_has_no_divergence_from_itself() -> None:
    actual = evaluate(model(bigrams(0)), windows(), against=model(bigrams(0)))
    assert (actual.kl_mean, actual.kl_median, actual.kl_99, actual.same_top_1) == (0.0, 0.0, 0.0, 1.0)
    assert actual.perplexity == evaluate(model(bigrams(0)), windows()).perplexity


def test_half_precision_logits_are_scored_in_float32() -> None:
    table = bigrams(0).to(torch.bfloat16)
    actual = evaluate(model(table), windows(), against=model(table))
    assert actual.perplexity == pytest.approx(perplexity_by_hand(model(table), windows()), rel=100 * EPSILON)


def test_metrics_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_EVALUATE", 48)
    batches = scoring.batches(windows())
    assert [len(batch) for batch in batches] == [2, 2, 1]
    scores = Scores.joined([score(bigrams(0)[batch], batch, bigrams(1)[batch]) for batch in batches])
    assert summary(scores) == evaluate(model(bigrams(0)), windows(), against=model(bigrams(1)))


def test_sequence_longer_than_a_batch_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_EVALUATE", 4)
    assert [len(batch) for batch in scoring.batches(windows())] == [1] * 5


def test_probability_change_equals_that_of_a_plain_loop() -> None:
    original, quantized, tokens = bigrams(0), bigrams(0) + 0.3 * bigrams(1), windows()
    p, q = np.exp(log_softmax(original[tokens])), np.exp(log_softmax(quantized[tokens]))
    squares = [
        (q[s, t, token] - p[s, t, token]) ** 2
        for s, window in enumerate(tokens.tolist())
        for t, token in enumerate(window[1:])
    ]
    actual = evaluate(model(quantized), tokens, against=model(original))
    assert actual.rms_dp == pytest.approx(math.sqrt(np.mean(squares)), rel=100 * EPSILON)


def test_perplexities_and_ratio_use_the_same_logits() -> None:
    original, quantized, tokens = model(bigrams(0)), model(bigrams(0) + 0.3 * bigrams(1)), windows()
    scores = score(quantized(tokens), tokens, original(tokens))
    assert summary_of_original(scores) == evaluate(original, tokens)
    assert summary(scores) == evaluate(quantized, tokens, against=original)
    ratio = perplexity_by_hand(quantized, tokens) / perplexity_by_hand(original, tokens)
    assert summary(scores).perplexity_ratio == pytest.approx(ratio, rel=200 * EPSILON)
    assert summary_of_original(score(quantized(tokens), tokens)) is None


def test_metrics_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, original = model(bigrams(0) + 0.3 * bigrams(1)), model(bigrams(0))
    expected = evaluate(quantized, windows(), against=original)
    monkeypatch.setattr(scoring, "ENTRIES_AT_ONCE", 7 * VOCABULARY)  # 120 tokens are not a multiple of 7
    assert evaluate(quantized, windows(), against=original) == expected


# ---- intervals


def scores_of(divergences: Tensor, *, original_loss: Tensor | None = None, rise: float = 0.0) -> Scores:
    """Artificial scores: a KL divergence per sequence (S,), and a loss that is `rise` above the original (S, T - 1)."""
    S = len(divergences)
    loss = torch.zeros(S, 3) if original_loss is None else original_loss
    kl = divergences[:, None].expand(S, loss.shape[1] + 1)
    return Scores(loss + rise, Comparison(kl, torch.ones_like(kl, dtype=torch.bool), loss))


def test_interval_matches_the_variance_between_sequences() -> None:
    """The mean of many sequences is normally distributed: 1.96 standard errors to each side.

    A 2.5 % quantile of 1000 normal draws has an error of 0.085 standard deviations, the mean of 16 a quarter of that;
    three times as much is allowed. The 5 % quantile would differ by 0.31.
    """
    ends = []
    for seed in range(16):
        values = torch.rand(400, generator=torch.Generator().manual_seed(seed))
        actual = summary(scores_of(values)).kl_mean_interval
        assert actual is not None
        error = float(values.std()) / math.sqrt(len(values))
        ends.append([(end - float(values.mean())) / error for end in actual])
    assert np.mean(ends, axis=0) == pytest.approx([-1.96, 1.96], abs=3 * 0.085 / 4)


def test_tokens_of_a_sequence_are_drawn_together() -> None:
    """Half of the tokens of each sequence at 1, the others at 0: no variance between sequences."""
    kl = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    scores = Scores(torch.zeros(3, 3), Comparison(kl, kl > 0, torch.zeros(3, 3)))
    assert summary(scores).kl_mean_interval == pytest.approx((0.5, 0.5), abs=1e-12)


def width(interval: Interval | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def test_perplexity_ratio_uses_the_same_draws() -> None:
    """A loss that rises by 0.1 everywhere: the perplexities are uncertain, but their ratio is not."""
    loss = torch.rand(20, 8, generator=torch.Generator().manual_seed(4))
    actual = summary(scores_of(torch.zeros(20), original_loss=loss, rise=0.1))
    assert width(actual.perplexity_interval) > 0.05
    assert actual.perplexity_ratio == pytest.approx(math.exp(0.1), rel=4 * EPSILON)
    assert actual.perplexity_ratio_interval == pytest.approx((math.exp(0.1), math.exp(0.1)), rel=4 * EPSILON)


def one_each(*sizes: int) -> Bootstrap:
    """Texts in which each sequence, of four tokens, is a document; `sizes` are their numbers of sequences."""
    return Bootstrap([torch.arange(size)[:, None].expand(size, 4) for size in sizes])


def test_each_text_keeps_its_share_of_the_draws() -> None:
    """Two texts without variance in each: the total is certain only if each text keeps its share."""
    scores = scores_of(torch.tensor([0.0] * 10 + [1.0] * 5))
    assert width(summary(scores, one_each(15)).kl_mean_interval) > 0.3
    assert summary(scores, one_each(10, 5)).kl_mean_interval == pytest.approx((1 / 3, 1 / 3), abs=1e-12)


def test_single_sequence_or_infinite_value_has_no_interval() -> None:
    assert summary(scores_of(torch.tensor([1.0]))).kl_mean_interval is None
    assert summary(scores_of(torch.tensor([1.0, 2.0])), one_each(1, 1)).kl_mean_interval is None
    actual = summary(scores_of(torch.tensor([1.0, math.inf])))
    assert (actual.kl_mean, actual.kl_mean_interval) == (math.inf, None)
    assert actual.same_top_1_interval == (1.0, 1.0)


def test_intervals_are_deterministic() -> None:
    actual = [evaluate(model(bigrams(0)), windows(), against=model(bigrams(1))) for _ in range(2)]
    assert actual[0] == actual[1]
