"""Perplexity and divergence against loops over single tokens in float64; and the text that they are taken on."""

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
    """(V, V) logits of the next token by the one before."""
    return spread * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def model(table: Tensor) -> Logits:
    return lambda tokens: table[tokens]


def windows(S: int = 5, T: int = 24) -> Tensor:
    return torch.randint(0, VOCABULARY, (S, T), generator=torch.Generator().manual_seed(9))


def evaluate(logits: Logits, tokens: Tensor, *, against: Logits | None = None) -> Evaluation:
    """The figures from the logits of all of `tokens` (S, T) at once."""
    return summary(score(logits(tokens), tokens, None if against is None else against(tokens)))


def log_softmax(logits: Tensor) -> NDArray[np.float64]:
    values = logits.double().numpy()
    highest = values.max(-1, keepdims=True)
    return values - highest - np.log(np.exp(values - highest).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def perplexity_by_hand(logits: Logits, tokens: Tensor) -> float:
    """Every token of a window but its first, one window at a time."""
    total, count = 0.0, 0
    for window in tokens:
        predicted = log_softmax(logits(window[None]))[0]
        for position in range(len(window) - 1):
            total -= predicted[position, int(window[position + 1])]
            count += 1
    return math.exp(total / count)


# ---- figures


def test_perplexity_is_that_of_a_plain_loop() -> None:
    found = evaluate(model(bigrams(0)), windows())
    assert found.tokens == 5 * 23
    # A log-probability of up to 20 is off by a few epsilons of it, and so is the perplexity, relatively.
    assert found.perplexity == pytest.approx(perplexity_by_hand(model(bigrams(0)), windows()), rel=100 * EPSILON)
    assert found.kl_mean is None and found.same_top_1 is None


def test_guessing_has_the_perplexity_of_the_vocabulary() -> None:
    assert evaluate(model(torch.zeros(VOCABULARY, VOCABULARY)), windows()).perplexity == pytest.approx(VOCABULARY)


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, 0] = 1e6
    assert evaluate(model(table), windows()).perplexity == math.inf


def test_divergence_is_that_of_a_plain_loop() -> None:
    original, quantized, tokens = bigrams(0), bigrams(0) + 0.3 * bigrams(1), windows()
    found = evaluate(model(quantized), tokens, against=model(original))
    p, q = log_softmax(original[tokens]), log_softmax(quantized[tokens])
    divergences = (np.exp(p) * (p - q)).sum(-1).flatten()  # (S * T,), the last position of a window counts too
    # Terms of either sign, of the size of a log-probability times its probability, summed in float32.
    tolerance = 100 * EPSILON * float((np.exp(p) * (np.abs(p) + np.abs(q))).sum(-1).max())
    assert found.kl_mean == pytest.approx(divergences.mean(), abs=tolerance)
    assert found.kl_median == pytest.approx(np.quantile(divergences, 0.5, method="higher"), abs=tolerance)
    assert found.kl_99 == pytest.approx(np.sort(divergences)[int(0.99 * len(divergences))], abs=tolerance)
    assert found.same_top_1 == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))
    assert np.median(divergences) < divergences.mean() < divergences.max()  # so that no figure passes for another


def test_quantiles_are_those_of_all_tokens() -> None:
    kl = torch.randperm(2000, generator=torch.Generator().manual_seed(5)).reshape(50, 40).float()
    found = summary(Scores(torch.zeros(50, 39), Comparison(kl, kl > 0, torch.zeros(50, 39))))
    assert (found.kl_median, found.kl_99, found.kl_999) == (1000, 1980, 1998)


def test_divergence_is_from_the_original_and_not_towards_it() -> None:
    """Where the original is sure, a model that is not loses much; the other way round it loses little."""
    sure, unsure = bigrams(0, spread=8.0), bigrams(0, spread=0.1)
    p, q = log_softmax(sure), log_softmax(unsure)
    tokens = torch.arange(VOCABULARY)[None]
    assert evaluate(model(unsure), tokens, against=model(sure)).kl_mean == pytest.approx(
        (np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4
    )


def test_a_model_is_as_far_as_nothing_from_itself() -> None:
    found = evaluate(model(bigrams(0)), windows(), against=model(bigrams(0)))
    assert (found.kl_mean, found.kl_median, found.kl_99, found.same_top_1) == (0.0, 0.0, 0.0, 1.0)
    assert found.perplexity == evaluate(model(bigrams(0)), windows()).perplexity


def test_half_precision_logits_are_taken_in_float32() -> None:
    table = bigrams(0).to(torch.bfloat16)
    found = evaluate(model(table), windows(), against=model(table))
    assert found.perplexity == pytest.approx(perplexity_by_hand(model(table), windows()), rel=100 * EPSILON)


def test_figures_do_not_depend_on_how_windows_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_EVALUATE", 48)
    batches = scoring.batches(windows())
    assert [len(batch) for batch in batches] == [2, 2, 1]
    scores = Scores.joined([score(bigrams(0)[batch], batch, bigrams(1)[batch]) for batch in batches])
    assert summary(scores) == evaluate(model(bigrams(0)), windows(), against=model(bigrams(1)))


def test_a_window_longer_than_a_batch_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOKENS_PER_BATCH_TO_EVALUATE", 4)
    assert [len(batch) for batch in scoring.batches(windows())] == [1] * 5


def test_the_change_of_the_next_tokens_probability_is_that_of_a_plain_loop() -> None:
    original, quantized, tokens = bigrams(0), bigrams(0) + 0.3 * bigrams(1), windows()
    p, q = np.exp(log_softmax(original[tokens])), np.exp(log_softmax(quantized[tokens]))
    squares = [
        (q[s, t, token] - p[s, t, token]) ** 2
        for s, window in enumerate(tokens.tolist())
        for t, token in enumerate(window[1:])
    ]
    found = evaluate(model(quantized), tokens, against=model(original))
    assert found.rms_dp == pytest.approx(math.sqrt(np.mean(squares)), rel=100 * EPSILON)


def test_perplexities_of_both_and_their_ratio_come_from_the_same_logits() -> None:
    original, quantized, tokens = model(bigrams(0)), model(bigrams(0) + 0.3 * bigrams(1)), windows()
    scores = score(quantized(tokens), tokens, original(tokens))
    assert summary_of_original(scores) == evaluate(original, tokens)
    assert summary(scores) == evaluate(quantized, tokens, against=original)
    ratio = perplexity_by_hand(quantized, tokens) / perplexity_by_hand(original, tokens)
    assert summary(scores).perplexity_ratio == pytest.approx(ratio, rel=200 * EPSILON)
    assert summary_of_original(score(quantized(tokens), tokens)) is None


def test_figures_do_not_depend_on_how_many_tokens_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, original = model(bigrams(0) + 0.3 * bigrams(1)), model(bigrams(0))
    expected = evaluate(quantized, windows(), against=original)
    monkeypatch.setattr(scoring, "ENTRIES_AT_ONCE", 7 * VOCABULARY)  # 120 tokens are no multiple of 7
    assert evaluate(quantized, windows(), against=original) == expected


# ---- intervals


def scores_of(divergences: Tensor, *, original_loss: Tensor | None = None, rise: float = 0.0) -> Scores:
    """Made-up scores: a KL divergence for each window (S,), a loss that is `rise` above the original's (S, T - 1)."""
    S = len(divergences)
    loss = torch.zeros(S, 3) if original_loss is None else original_loss
    kl = divergences[:, None].expand(S, loss.shape[1] + 1)
    return Scores(loss + rise, Comparison(kl, torch.ones_like(kl, dtype=torch.bool), loss))


def test_an_interval_is_what_the_spread_between_windows_makes_it() -> None:
    """The mean of many windows is normal: 1.96 standard errors to each side.

    A 2.5 % quantile of 1000 normal draws is off by 0.085 standard deviations, the mean of 16 by a fourth of that; three
    times as much is allowed.  A quantile of 5 % would lie 0.31 away.
    """
    ends = []
    for seed in range(16):
        values = torch.rand(400, generator=torch.Generator().manual_seed(seed))
        found = summary(scores_of(values)).kl_mean_interval
        assert found is not None
        error = float(values.std()) / math.sqrt(len(values))
        ends.append([(end - float(values.mean())) / error for end in found])
    assert np.mean(ends, axis=0) == pytest.approx([-1.96, 1.96], abs=3 * 0.085 / 4)


def test_tokens_of_a_window_are_drawn_together() -> None:
    """Half of the tokens of each window at 1, the others at 0: that varies much, and between windows not at all."""
    kl = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    scores = Scores(torch.zeros(3, 3), Comparison(kl, kl > 0, torch.zeros(3, 3)))
    assert summary(scores).kl_mean_interval == pytest.approx((0.5, 0.5), abs=1e-12)


def width(interval: Interval | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def test_a_ratio_of_perplexities_is_drawn_on_the_same_windows_for_both() -> None:
    """A loss that rises by 0.1 everywhere: the perplexities are as uncertain as the text, their ratio is not."""
    loss = torch.rand(20, 8, generator=torch.Generator().manual_seed(4))
    found = summary(scores_of(torch.zeros(20), original_loss=loss, rise=0.1))
    assert width(found.perplexity_interval) > 0.05
    assert found.perplexity_ratio == pytest.approx(math.exp(0.1), rel=4 * EPSILON)
    assert found.perplexity_ratio_interval == pytest.approx((math.exp(0.1), math.exp(0.1)), rel=4 * EPSILON)


def test_each_text_keeps_its_share_of_the_draws() -> None:
    """Two texts, each alike throughout: a total over both is certain, where windows of one text would vary."""
    scores = scores_of(torch.tensor([0.0] * 10 + [1.0] * 5))
    assert width(summary(scores, [15]).kl_mean_interval) > 0.3
    assert summary(scores, [10, 5]).kl_mean_interval == pytest.approx((1 / 3, 1 / 3), abs=1e-12)


def test_there_is_no_interval_where_nothing_can_be_drawn_or_a_figure_is_infinite() -> None:
    assert summary(scores_of(torch.tensor([1.0]))).kl_mean_interval is None
    assert summary(scores_of(torch.tensor([1.0, 2.0])), [1, 1]).kl_mean_interval is None
    found = summary(scores_of(torch.tensor([1.0, math.inf])))
    assert (found.kl_mean, found.kl_mean_interval) == (math.inf, None)
    assert found.same_top_1_interval == (1.0, 1.0)


def test_intervals_are_the_same_every_time() -> None:
    found = [evaluate(model(bigrams(0)), windows(), against=model(bigrams(1))) for _ in range(2)]
    assert found[0] == found[1]


# ---- WikiText's rows


def test_rows_of_wikitext_are_joined_with_blank_lines_and_blank_rows_are_emptied() -> None:
    text = " \n = Title = \n \n First paragraph . \n Second one . \n \n"
    rows = ["", " = Title = \n", "", " First paragraph . \n", " Second one . \n", ""]
    assert wikitext_rows(text) == "\n\n".join(rows)


def test_only_a_line_feed_ends_a_row() -> None:
    text = " one\u2028line \n another\x0cline \n"
    assert wikitext_rows(text) == " one\u2028line \n\n\n another\x0cline \n"


def test_the_test_text_of_wikitext_2_has_the_rows_that_it_is_known_to_have(shared: Path) -> None:
    file = shared / "data" / "wikitext2-raw.test.txt"
    if not file.is_file():
        pytest.skip("needs ../shared/data/wikitext2-raw.test.txt, which is not beside this checkout")
    joined = wikitext_rows(calibration.read_text(file))
    assert len(joined.split("\n\n")) == 4358  # the number of rows of its test split; a row's own end is one line feed
    assert joined.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")


# ---- windows of a text


def test_a_text_file_is_tokenized_once(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n\n" * 500)
    ids = tokenizer(file.read_text())["input_ids"]
    found = read_windows(str(file), tokenizer, 32)
    assert found.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert found.flatten().tolist().count(BOS) == 1


def test_a_wikitext_file_is_joined_before(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" = Title = \n \n Text . \n")
    [joined] = read_windows(str(file), tokenizer, 26, wikitext=True)
    assert tokenizer.decode(joined[1:]) == " = Title = \n\n\n\n\n Text . \n"
    [plain] = read_windows(str(file), tokenizer, 24)
    assert tokenizer.decode(plain[1:]) == " = Title = \n \n Text . \n"


def test_documents_are_tokenized_one_by_one_in_their_order(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    texts = [f"Document {number}." for number in range(10)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = read_windows(str(file), tokenizer, 12).flatten().tolist()
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert found == expected[: len(expected) // 12 * 12]
    assert found.count(BOS) == 10


def test_rows_of_a_data_set_are_joined_with_the_blank_ones(tokenizer: Any, tmp_path: Path) -> None:
    """Perplexities of WikiText can be compared only if nobody leaves its 1,467 blank rows out."""
    pytest.importorskip("datasets", reason="reading a data set needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a data set needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a data set needs pyarrow")
    parquet.write_table(pyarrow.table({"text": ["", " = Title = \n", "", " Text . \n"]}), tmp_path / "test.parquet")
    [found] = read_windows(f"{tmp_path}::test:text", tokenizer, 28)
    assert tokenizer.decode(found[1:]) == "\n\n = Title = \n\n\n\n\n Text . \n"


def test_a_data_set_of_more_rows_than_calibration_reads_is_read_to_its_end(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="reading a data set needs the package datasets")
    pyarrow = pytest.importorskip("pyarrow", reason="reading a data set needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading a data set needs pyarrow")
    rows = 4358  # of WikiText-2's test text
    assert sources.HUB_DOCUMENTS < rows
    parquet.write_table(pyarrow.table({"text": ["a"] * rows}), tmp_path / "test.parquet")
    found = read_windows(f"{tmp_path}::test:text", tokenizer, 1)
    assert len(found) == 1 + rows + 2 * (rows - 1)  # the beginning, a letter a row, two line feeds between


def test_the_number_of_windows_can_be_limited(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word " * 100)
    assert len(read_windows(str(file), tokenizer, 50)) == 10
    assert torch.equal(read_windows(str(file), tokenizer, 50, limit=3), read_windows(str(file), tokenizer, 50)[:3])


def test_a_text_shorter_than_a_window_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word")
    with pytest.raises(CalibrationError, match=r"holds 5 tokens, fewer than one sequence of 50") as caught:
        read_windows(str(file), tokenizer, 50)
    assert "--seqlen" in caught.value.hint
