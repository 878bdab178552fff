"""Cluster bootstrap and paired differences, on cases whose variance is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq.errors import ConfigError
from llmq.evaluation.bootstrap import Bootstrap, Interval, draws
from llmq.evaluation.paired import all_differences, differences
from llmq.evaluation.results import Documents, Figures, Measurement, Size
from llmq.evaluation.summary import Evaluation

Z = 1.96  # standard errors to each side of a normal distribution that contain 95 %


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_width(interval: Interval | None) -> float:
    assert interval is not None
    return (interval[1] - interval[0]) / 2


# ---- intervals


def test_draws_are_those_of_a_plain_bootstrap() -> None:
    """The number of times that a document is drawn has the mean 1 and the variance 1 - 1/D, and D are drawn."""
    weights = draws([50, 20])
    assert weights.shape == (1000, 70)
    assert torch.equal(weights[:, :50].sum(1), torch.full((1000,), 50.0, dtype=torch.float64))
    assert torch.equal(weights[:, 50:].sum(1), torch.full((1000,), 20.0, dtype=torch.float64))
    variance = weights[:, :50].var(0).mean().item()
    assert variance == pytest.approx(1 - 1 / 50, abs=0.03)  # of 50 000 counts: 3 standard errors are 0.02


def test_tokens_of_a_document_are_drawn_together() -> None:
    """300 documents of 8 equal tokens: the standard error is that of 300 values, not of 2400."""
    values = normal(300)[:, None].expand(300, 8)
    clustered = Bootstrap([torch.arange(300)[:, None].expand(300, 8)]).interval(values)
    as_tokens = Bootstrap([torch.arange(2400).reshape(300, 8)]).interval(values)
    error = float(values[:, 0].std()) / math.sqrt(300)
    assert half_width(clustered) == pytest.approx(Z * error, rel=0.1)
    assert half_width(as_tokens) == pytest.approx(Z * error / math.sqrt(8), rel=0.1)


def test_long_documents_count_by_their_tokens() -> None:
    """Linearized: the variance of a ratio of sums is that of Σ n_d (x_d - mean) over (Σ n_d)²."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (400,), generator=generator)
    means = normal(400, seed=2) + lengths / 4  # long documents have larger values
    owners = torch.arange(400).repeat_interleave(lengths)[None]  # (1, tokens)
    values = means[owners]
    mean = float(values.mean())
    error = float((lengths * (means - mean)).square().sum().sqrt() / lengths.sum())
    actual = Bootstrap([owners]).interval(values)
    assert actual is not None
    assert half_width(actual) == pytest.approx(Z * error, rel=0.1)
    assert sum(actual) / 2 == pytest.approx(mean, abs=0.2 * error)


def test_document_may_span_sequences() -> None:
    owners = torch.tensor([[0, 0, 0], [0, 1, 1], [2, 2, 2]])
    sums, counts = Bootstrap([owners]).sums(torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]))
    assert (sums.tolist(), counts.tolist()) == ([10, 11, 24], [4, 2, 3])
    sums, counts = Bootstrap([owners]).sums(torch.tensor([[1, 2], [4, 5], [7, 8]]))  # one per predicted token
    assert (sums.tolist(), counts.tolist()) == ([7, 5, 15], [3, 1, 2])


def test_documents_of_different_texts_differ() -> None:
    bootstrap = Bootstrap([torch.tensor([[0, 1]]), torch.tensor([[0, 5]])])
    assert bootstrap.sizes == (2, 2)
    assert bootstrap.sums(torch.tensor([[1, 2], [3, 4]]))[0].tolist() == [1, 2, 3, 4]


def test_95_of_100_intervals_contain_the_true_mean() -> None:
    """Of 200 samples with 40 documents each; the count has a standard deviation of 3."""
    owners = torch.arange(40)[:, None].expand(40, 2)
    bootstrap = Bootstrap([owners])
    inside = 0
    for seed in range(200):
        interval = bootstrap.interval(normal(40, seed=seed)[:, None].expand(40, 2))
        assert interval is not None
        inside += interval[0] <= 0 <= interval[1]
    assert 0.95 * 200 - 12 <= inside <= 0.95 * 200 + 9


# ---- paired differences


def measurement(*texts: tuple[Tensor, list[int]]) -> Measurement:
    """A model with the mean KL of each document, and the documents' numbers of tokens, of each text."""
    figures = tuple(
        Figures(
            f"text {number}", 1, Evaluation(1, 1.0), documents=Documents("documents", tuple(tokens), tuple(kl.tolist()))
        )
        for number, (kl, tokens) in enumerate(texts)
    )
    return Measurement(figures, Figures(f"{len(texts)} texts", 1, Evaluation(1, 1.0)), 8, Size(1, None))


def test_constant_difference_is_certain() -> None:
    """The models differ by 0.1 on each document, which differ from each other by more."""
    kl, tokens = 5 + normal(30), [4] * 30
    [actual] = differences(measurement((kl, tokens)), measurement((kl - 0.1, tokens)), "a", "b")
    assert (actual.first, actual.second, actual.text) == ("a", "b", "text 0")
    assert actual.difference == pytest.approx(-0.1)
    assert actual.interval == pytest.approx((-0.1, -0.1))
    assert (actual.lower, actual.higher, actual.documents, actual.is_resolved) == (30, 0, 30, True)
    assert actual.ratio == pytest.approx(1 - 0.1 / float(kl.mean()))


def test_interval_of_a_difference_has_its_variance() -> None:
    """Independent noise of 0.1 on 400 documents that differ by 1: only the noise counts."""
    kl, noise, tokens = 9 + normal(400), 0.1 * normal(400, seed=1), [3] * 400
    [actual] = differences(measurement((kl, tokens)), measurement((kl + noise, tokens)))
    assert actual.difference == pytest.approx(float(noise.mean()))
    assert half_width(actual.interval) == pytest.approx(Z * float(noise.std()) / 20, rel=0.1)
    assert actual.lower == int((noise < 0).sum()) and actual.lower + actual.higher == 400
    assert not actual.is_resolved  # 400 draws of noise with the mean 0


def test_documents_are_weighted_by_tokens_and_ties_count_for_nobody() -> None:
    first, second = torch.tensor([1.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 5.0])
    [actual] = differences(measurement((first, [10, 30, 10])), measurement((second, [10, 30, 10])))
    assert actual.difference == pytest.approx((-30 + 10) / 50)
    assert actual.ratio == pytest.approx(60 / 80)
    assert (actual.lower, actual.higher) == (1, 1)


def test_texts_are_compared_alone_and_together() -> None:
    """One text with half of the KL, one with twice as much: together they are equal, with few documents each."""
    ones, tokens = torch.ones(6, dtype=torch.float64), [2] * 6
    first, second = measurement((ones, tokens), (ones, tokens)), measurement((ones / 2, tokens), (1.5 * ones, tokens))
    actual = differences(first, second)
    assert [difference.text for difference in actual] == ["text 0", "text 1", "2 texts"]
    assert [difference.difference for difference in actual] == pytest.approx([-0.5, 0.5, 0])
    assert (actual[2].lower, actual[2].higher, actual[2].documents) == (6, 6, 12)
    assert actual[2].interval == pytest.approx((0, 0))  # each text keeps its number of documents


def test_model_equal_to_the_original_has_no_ratio() -> None:
    [actual] = differences(measurement((torch.zeros(3), [2] * 3)), measurement((torch.ones(3), [2] * 3)))
    assert (actual.ratio, actual.ratio_interval, actual.difference) == (None, None, 1.0)


def test_one_document_has_no_interval() -> None:
    [actual] = differences(measurement((torch.ones(1), [2])), measurement((torch.zeros(1), [2])))
    assert (actual.interval, actual.is_resolved, actual.difference) == (None, False, -1.0)


def test_all_pairs_are_compared() -> None:
    models = {name: measurement((torch.full((3,), float(index)), [2] * 3)) for index, name in enumerate("abc")}
    pairs = [(difference.first, difference.second) for difference in all_differences(models)]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


def test_other_texts_are_refused() -> None:
    model = measurement((torch.ones(3), [2] * 3))
    with pytest.raises(ConfigError, match="expected the same texts"):
        differences(model, measurement((torch.ones(3), [2] * 3), (torch.ones(3), [2] * 3)))
    with pytest.raises(ConfigError, match="expected the same tokens"):
        differences(model, measurement((torch.ones(3), [2, 2, 1])))
    alone = replace(model, texts=tuple(replace(figures, documents=None) for figures in model.texts))
    with pytest.raises(ConfigError, match="needs an original"):
        differences(model, alone)


# ---- the worst text


def test_the_text_with_the_highest_kl_is_named() -> None:
    evaluations = [Evaluation(1, 1.0, kl_mean=kl) for kl in (0.1, 0.3, 0.2)]
    texts = tuple(Figures(f"text {number}", 1, evaluation) for number, evaluation in enumerate(evaluations))
    total = Figures("3 texts", 3, evaluations[2], original=Evaluation(1, 1.0))
    model = Measurement(texts, total, 8, Size(1, None))
    assert model.worst is texts[1] and model.to_dict()["worst"] == "text 1"
    assert replace(model, total=replace(total, original=None)).worst is None
    assert replace(model, texts=texts[:1]).worst is None
    nan = replace(texts[0], model=Evaluation(1, 1.0, kl_mean=math.inf))
    assert replace(model, texts=(*texts[1:], nan)).worst is nan
    assert np.isfinite(model.worst.model.kl_mean or math.nan)
