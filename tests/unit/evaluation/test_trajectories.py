"""Greedy trajectories of models that are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq.errors import CalibrationError
from llmq.evaluation.texts import EvaluationText
from llmq.evaluation.trajectories import LENGTH, PROMPT, compared, greedy, prompts_of

VOCABULARY, END = 50, 49


def counting(step: int, *, until: int = VOCABULARY) -> Callable[[Tensor], Tensor]:
    """A model that continues 3, 4 with 4 + step, …; a token of at least `until` is followed by the end."""

    def logits(tokens: Tensor) -> Tensor:
        following = (tokens[:, -1] + step) % END
        following = torch.where(tokens[:, -1] >= until, END, following)
        return torch.nn.functional.one_hot(following, VOCABULARY).float()

    return logits


def test_continuations_are_the_most_likely_tokens() -> None:
    prompts = torch.tensor([[1, 2], [5, 9]])
    written = greedy(counting(3), prompts, frozenset())
    assert written.shape == (2, LENGTH)
    assert written[0].tolist() == [(2 + 3 * (i + 1)) % END for i in range(LENGTH)]
    assert written[1].tolist() == [(9 + 3 * (i + 1)) % END for i in range(LENGTH)]


def test_text_that_ended_stays_ended() -> None:
    [written] = greedy(counting(1, until=12), torch.tensor([[8]]), frozenset({END}))
    assert written.tolist() == [9, 10, 11, 12] + [END] * (LENGTH - 4)


def test_share_and_position_of_the_first_difference() -> None:
    """Of four prompts, one stays the same, and three differ first at the tokens 1, 4 and 7."""
    prompts = torch.tensor([[20], [12], [9], [6]])  # counting up reaches 12 after 0, 3 and 6 tokens
    expected = greedy(counting(1), prompts, frozenset({END}))
    expected[0] = END  # the first prompt
    written = greedy(counting(1, until=12), prompts, frozenset({END}))
    actual = compared(written, expected)
    assert (actual.prompts, actual.same) == (4, 0.25)
    assert actual.first_difference == pytest.approx((1 + 4 + 7) / 3)
    assert actual.same_interval is not None and actual.same_interval[0] == 0.0


def test_equal_models_have_no_difference() -> None:
    written = greedy(counting(2), torch.tensor([[3]]), frozenset())
    actual = compared(written, written.clone())
    assert (actual.same, actual.same_interval, actual.first_difference) == (1.0, None, None)
    assert compared(written, written + 1).first_difference == 1.0


# ---- prompts


def text(unit: str, *lengths: int, seqlen: int, first: int = 0) -> EvaluationText:
    """A text of the tokens first, first + 1, …, with documents of these lengths."""
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    S = len(owners) // seqlen
    tokens = first + torch.arange(S * seqlen)
    return EvaluationText("t", "t", tokens.reshape(S, seqlen), owners[: S * seqlen].reshape(S, seqlen), unit)


def test_prompts_are_beginnings_of_documents() -> None:
    """Also of documents that begin within a sequence and end in the next one; short documents are left out."""
    prompts = prompts_of([text("documents", 40, PROMPT - 1, PROMPT, 61, seqlen=20)], 9)
    assert prompts[:, 0].tolist() == [0, 40 + PROMPT - 1, 40 + 2 * PROMPT - 1]
    assert prompts.shape == (3, PROMPT) and torch.equal(prompts[1], prompts[1, 0] + torch.arange(PROMPT))


def test_text_without_documents_has_a_prompt_per_sequence() -> None:
    """The last sequence is too short, and no text follows it."""
    prompts = prompts_of([text("sequences", 20, 20, 20, seqlen=20)], 9)
    assert prompts[:, 0].tolist() == [0, 20]


def test_texts_take_turns() -> None:
    texts = [text("documents", 40, 40, 40, seqlen=40), text("documents", 40, 40, seqlen=40, first=1000)]
    assert prompts_of(texts, 4)[:, 0].tolist() == [0, 1000, 40, 1040]
    assert prompts_of(texts, 9)[:, 0].tolist() == [0, 1000, 40, 1040, 80]


def test_short_documents_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no document"):
        prompts_of([text("documents", 31, 31, seqlen=62)], 1)
