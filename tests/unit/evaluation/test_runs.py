"""Runs of models that are known: batches of different sizes, parts of the text, prompts, memory."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmq import memory
from llmq.errors import UnsupportedModelError
from llmq.evaluation.runs import Prompts, run_alone, run_compared
from llmq.evaluation.scoring import score
from llmq.evaluation.trajectories import greedy

VOCABULARY = 20


class Bigrams:
    """A model whose next token depends on the last one only; `batch` sequences are run together."""

    note: str | None = None
    activations = "none"
    vocabulary, max_tokens = VOCABULARY, None
    dtype, device, whole_bytes = torch.float32, torch.device("cpu"), 1000

    def __init__(self, seed: int, batch: int = 4, at_once: int | None = None) -> None:
        self._table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self._batch = batch
        self._at_once = at_once
        self.ran: list[int] = []

    def windows_at_once(self, length: int, sides: int) -> int | None:
        return self._at_once

    def run(self, windows: Tensor, part: int = 0, parts: int = 1) -> None:
        self._windows = windows
        self.ran.append(len(windows))

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens in self._windows.split(self._batch):
            yield tokens, self._table[tokens]

    def continue_greedily(self, prompts: Tensor, ends: frozenset[int]) -> Tensor:
        return greedy(lambda tokens: self._table[tokens[:, -1]], prompts, ends)


def windows(S: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (S, 6), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("batches", [(4, 4), (4, 1), (1, 4), (4, 3), (2, 5)])
def test_batches_of_the_two_models_may_differ(batches: tuple[int, int]) -> None:
    original, model = Bigrams(0, batches[0]), Bigrams(1, batches[1])
    [run] = run_compared(original, [lambda: model], windows())
    expected = score(model._table[windows()], windows(), original._table[windows()])
    assert torch.equal(run.scores.loss, expected.loss)
    assert run.scores.comparison is not None and expected.comparison is not None
    assert torch.equal(run.scores.comparison.divergence, expected.comparison.divergence)


def test_prompts_are_continued_once_by_each_model() -> None:
    original, same, other = Bigrams(0, at_once=3), Bigrams(0), Bigrams(1)
    prompts = Prompts(torch.arange(VOCABULARY)[:, None], frozenset())
    runs = run_compared(original, [lambda: same, lambda: other], windows(), prompts)
    assert original.ran == same.ran == other.ran == [3, 3, 1]
    first, second = (run.trajectories for run in runs)
    assert first is not None and (first.prompts, first.same) == (VOCABULARY, 1.0)
    assert second is not None and second.same < 0.5 and second.first_difference is not None
    assert "3 times" in runs[0].notes[0]


def test_models_that_do_not_fit_into_memory_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "spare", lambda _: 1200)  # the original and the model have 1000 bytes
    [run] = run_compared(Bigrams(0), [lambda: Bigrams(1)], windows(), Prompts(torch.tensor([[1]]), frozenset()))
    [note] = run.notes
    assert run.trajectories is None and "trajectories were not compared" in note


def test_models_with_other_vocabularies_are_refused() -> None:
    other = Bigrams(1)
    other.vocabulary = VOCABULARY + 1
    with pytest.raises(UnsupportedModelError, match="vocabularies of 21 and 20"):
        run_compared(Bigrams(0), [lambda: other], windows())


def test_model_alone_has_no_comparison() -> None:
    run = run_alone(Bigrams(0), windows())
    assert run.scores.comparison is None and run.scores.loss.shape == (7, 5)


def test_a_model_is_freed_before_the_next_one_is_opened_although_it_is_in_a_cycle() -> None:
    opened: list[weakref.ref[Bigrams]] = []

    def model() -> Bigrams:
        assert not any(reference() for reference in opened)
        made = Bigrams(2)
        made.itself = made  # type: ignore[attr-defined]
        opened.append(weakref.ref(made))
        return made

    run_compared(Bigrams(1), [model, model, model], torch.zeros(2, 4, dtype=torch.int64))
    assert len(opened) == 3 and gc.get_freeze_count() == 0
