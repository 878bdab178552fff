"""Perplexity and divergence, compared with loops over single tokens in float64, and the evaluation text."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq import calibration, memory
from llmq.calibration import sources
from llmq.errors import CalibrationError
from llmq.evaluation import scoring
from llmq.evaluation.scoring import (
    Comparison,
    Evaluation,
    Interval,
    Scores,
    read_windows,
    score,
    summary,
    summary_of_original,
    wikitext_rows,
)

BOS = 1
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
    assert (actual.kl_median, actual.kl_99, actual.kl_999) == (1000, 1980, 1998)


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


def test_each_text_keeps_its_share_of_the_draws() -> None:
    """Two texts without variance in each: the total is certain only if each text keeps its share."""
    scores = scores_of(torch.tensor([0.0] * 10 + [1.0] * 5))
    assert width(summary(scores, [15]).kl_mean_interval) > 0.3
    assert summary(scores, [10, 5]).kl_mean_interval == pytest.approx((1 / 3, 1 / 3), abs=1e-12)


def test_single_sequence_or_infinite_value_has_no_interval() -> None:
    assert summary(scores_of(torch.tensor([1.0]))).kl_mean_interval is None
    assert summary(scores_of(torch.tensor([1.0, 2.0])), [1, 1]).kl_mean_interval is None
    actual = summary(scores_of(torch.tensor([1.0, math.inf])))
    assert (actual.kl_mean, actual.kl_mean_interval) == (math.inf, None)
    assert actual.same_top_1_interval == (1.0, 1.0)


def test_intervals_are_deterministic() -> None:
    actual = [evaluate(model(bigrams(0)), windows(), against=model(bigrams(1))) for _ in range(2)]
    assert actual[0] == actual[1]


# ---- rows of WikiText


def test_wikitext_rows_are_joined_with_blank_lines() -> None:
    text = " \n = Title = \n \n First paragraph . \n Second one . \n \n"
    rows = ["", " = Title = \n", "", " First paragraph . \n", " Second one . \n", ""]
    assert wikitext_rows(text) == "\n\n".join(rows)


def test_only_a_line_feed_ends_a_row() -> None:
    text = " one\u2028line \n another\x0cline \n"
    assert wikitext_rows(text) == " one\u2028line \n\n\n another\x0cline \n"


def test_wikitext_2_has_the_known_number_of_rows(shared: Path) -> None:
    file = shared / "data" / "wikitext2-raw.test.txt"
    if not file.is_file():
        pytest.skip("needs ../shared/data/wikitext2-raw.test.txt, which is not next to this checkout")
    joined = wikitext_rows(calibration.read_text(file))
    assert len(joined.split("\n\n")) == 4358  # the number of rows of its test split; each row ends with a line feed
    assert joined.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


# ---- sequences of a text


def test_text_file_is_tokenized_once(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n\n" * 500)
    ids = tokenizer(file.read_text())["input_ids"]
    actual = read_windows(str(file), tokenizer, 32)
    assert actual.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert actual.flatten().tolist().count(BOS) == 1


def test_wikitext_file_is_joined_first(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" = Title = \n \n Text . \n")
    [joined] = read_windows(str(file), tokenizer, 26, wikitext=True)
    assert tokenizer.decode(joined[1:]) == " = Title = \n\n\n\n\n Text . \n"
    [plain] = read_windows(str(file), tokenizer, 24)
    assert tokenizer.decode(plain[1:]) == " = Title = \n \n Text . \n"


def test_documents_are_tokenized_in_order(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    texts = [f"Document {number}." for number in range(10)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    actual = read_windows(str(file), tokenizer, 12).flatten().tolist()
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert actual == expected[: len(expected) // 12 * 12]
    assert actual.count(BOS) == 10


def test_dataset_rows_are_joined_with_blank_rows(tokenizer: Any, tmp_path: Path) -> None:
    """WikiText perplexities are comparable only with its 1,467 blank rows."""
    pytest.importorskip("datasets", reason="reading a dataset needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a dataset needs pyarrow")
    parquet.write_table(pyarrow.table({"text": ["", " = Title = \n", "", " Text . \n"]}), tmp_path / "test.parquet")
    [actual] = read_windows(f"{tmp_path}::test:text", tokenizer, 28)
    assert tokenizer.decode(actual[1:]) == "\n\n = Title = \n\n\n\n\n Text . \n"


def test_long_dataset_is_read_completely(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="reading a dataset needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a dataset needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a dataset needs pyarrow")
    rows = 4358  # of the test split of WikiText-2
    assert sources.HUB_DOCUMENTS < rows
    parquet.write_table(pyarrow.table({"text": ["a"] * rows}), tmp_path / "test.parquet")
    actual = read_windows(f"{tmp_path}::test:text", tokenizer, 1)
    assert len(actual) == 1 + rows + 2 * (rows - 1)  # BOS, one letter per row, two line feeds between rows


def test_number_of_sequences_can_be_limited(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word " * 100)
    assert len(read_windows(str(file), tokenizer, 50)) == 10
    assert torch.equal(read_windows(str(file), tokenizer, 50, limit=3), read_windows(str(file), tokenizer, 50)[:3])


def test_text_shorter_than_a_sequence_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word")
    with pytest.raises(CalibrationError, match=r"holds 5 tokens, fewer than one sequence of 50") as caught:
        read_windows(str(file), tokenizer, 50)
    assert "--seqlen" in caught.value.hint
