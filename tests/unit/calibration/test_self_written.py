"""Self-generated text equals that of a plain loop with transformers, in memory and streamed."""

import bisect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from llmq.calibration import self_written
from llmq.calibration.cache import OwnText
from llmq.calibration.self_written import SelfAuthor, Voice, draw, write_rows
from llmq.errors import UnsupportedModelError
from llmq.model.passes.generate import Continuation, cache_argument, cache_bytes, in_memory, weight_bytes
from tests import builders
from tests.builders import SPECIAL, VOCABULARY

BOS, EOS = 1, 2
LETTERS = 259  # ids of the tokenizer; the embedding has five more rows
PLENTY, NOTHING = 10**12, 0
Checkpoints = Callable[..., Path]


def author(folder: Path, tokenizer: Any, free: int = PLENTY) -> SelfAuthor:
    return SelfAuthor(builders.skeleton_of(folder), tokenizer, free=free)


def without_bos(tokenizer: Any) -> Any:
    """A tokenizer stub without a beginning-of-text token."""
    return SimpleNamespace(
        bos_token_id=None, eos_token_id=EOS, all_special_ids=[0, EOS], get_vocab=tokenizer.get_vocab,
        added_tokens_decoder={BOS: SimpleNamespace(special=True)},
    )  # fmt: skip


def written_by_hand(folder: Path, numbers: Tensor) -> list[list[int]]:
    """Generate row by row and token by token, without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for row in numbers.tolist():
        ids, age = [BOS], 0
        for number in row[1:]:
            if ids[-1] == EOS:
                ids, age = [*ids, BOS], 0
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().tolist()
            temperature = max(1.0, 2 - age / 10)
            first = len(SPECIAL) if temperature > 1 else 0
            weights = [math.exp(logits[index] / temperature) for index in range(first, LETTERS)]
            reached = list(itertools.accumulate(weights))
            ids.append(first + bisect.bisect_right(reached, number * reached[-1]))
            age += 1
        rows.append(ids)
    return rows


# Rounding of logits moves cumulative probabilities by about 1e-6. One of 200 uniform numbers is affected with a
# probability of 2e-4, and the seeds below are fixed.
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon"])  # full attention, sliding, blocks that return a tuple
@pytest.mark.parametrize("free", [PLENTY, NOTHING], ids=["in memory", "streamed"])
def test_text_equals_that_of_a_plain_loop(free: int, name: str, tokenizer: Any, checkpoint: Checkpoints) -> None:
    folder = checkpoint(name)
    text = author(folder, tokenizer, free).write(3, 24, seed=5)
    numbers = torch.rand(3, 24, generator=torch.Generator().manual_seed(5))
    assert text.tolist() == written_by_hand(folder, numbers)


def test_batch_size_does_not_change_the_text(
    tokenizer: Any, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    whole = author(folder, tokenizer).write(5, 16, seed=0)
    monkeypatch.setattr(self_written, "ROWS", {"cpu": 2})
    assert torch.equal(author(folder, tokenizer).write(5, 16, seed=0), whole)
    assert not torch.equal(author(folder, tokenizer).write(5, 16, seed=1), whole)


@pytest.mark.parametrize("free", [PLENTY, NOTHING], ids=["in memory", "streamed"])
def test_texts_are_short_and_fill_the_sequences(
    tokenizer: Any, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(self_written, "TEXT_TOKENS" if free else "STREAMED_TOKENS", 6)
    monkeypatch.setattr(self_written, "STREAMED_ROWS", 2)
    writer = author(checkpoint("llama"), tokenizer, free)
    text = writer.write(2, 16, seed=0)
    assert text.shape == (2, 16) and bool((text.flatten()[::6] == BOS).all())
    assert ["block by block" in note for note in writer.notes] == [True] * (free == NOTHING)


def test_text_that_can_be_left_out_is_not_streamed(tokenizer: Any, checkpoint: Checkpoints) -> None:
    writer = author(checkpoint("llama"), tokenizer, NOTHING)
    assert writer.write(2, 16, seed=0, or_nothing=True).shape == (0, 16)
    assert len(writer.notes) == 1 and "does not fit into memory" in writer.notes[0]
    written = author(checkpoint("llama"), tokenizer).write(2, 16, seed=0, or_nothing=True)
    assert torch.equal(written, author(checkpoint("llama"), tokenizer).write(2, 16, seed=0))


def test_text_that_can_be_left_out_may_fail(
    tokenizer: Any, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*arguments: Any) -> None:
        raise TypeError("no such\nargument")

    monkeypatch.setattr(self_written, "write_rows", fails)
    kept = OwnText(tmp_path, "model")
    writer = SelfAuthor(builders.skeleton_of(checkpoint("llama")), tokenizer, kept, free=PLENTY)
    assert writer.write(2, 16, seed=0, or_nothing=True).shape == (0, 16)
    assert len(writer.notes) == 1 and "(TypeError: no such)" in writer.notes[0]
    with pytest.raises(TypeError):
        writer.write(2, 16, seed=0)
    kept.save()
    monkeypatch.undo()  # a run that continues has the same text: none
    again = SelfAuthor(builders.skeleton_of(checkpoint("llama")), tokenizer, kept, free=PLENTY)
    assert again.write(2, 16, seed=0, or_nothing=True).shape == (0, 16) and not again.notes


def test_text_that_can_be_left_out_needs_a_cache(
    tokenizer: Any, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_written, "cache_argument", lambda model: None)
    writer = author(checkpoint("llama"), tokenizer)
    assert writer.write(2, 16, seed=0, or_nothing=True).shape == (0, 16)
    assert len(writer.notes) == 1 and "keeps no state" in writer.notes[0]


def test_model_is_freed_afterwards(tokenizer: Any, checkpoint: Checkpoints) -> None:
    skeleton = builders.skeleton_of(checkpoint("llama"))
    SelfAuthor(skeleton, tokenizer, free=PLENTY).write(1, 8, seed=0)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    with pytest.raises(KeyError), in_memory(skeleton) as model:
        assert not any(parameter.is_meta for parameter in model.model.layers.parameters())
        raise KeyError
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_memory_limits_the_rows_per_batch(tokenizer: Any, checkpoint: Checkpoints) -> None:
    skeleton = builders.skeleton_of(checkpoint("llama"))
    assert cache_bytes(skeleton) == 2 * 3 * 2 * 8 * 4  # keys and values, blocks, heads, head width, bytes
    row = 16 * cache_bytes(skeleton) + 32 * VOCABULARY
    for rows, more in ((0, -8), (2, 8), (3, row), (self_written.ROWS["cpu"], 1000 * row)):
        free = math.ceil((weight_bytes(skeleton) + (2 * row if rows else 0) + more) / self_written.SPARE_PART)
        assert SelfAuthor(skeleton, tokenizer)._rows_at_once(16, free) == rows


def test_tied_weights_count_where_they_are_used(checkpoint: Checkpoints) -> None:
    free, tied = (builders.skeleton_of(checkpoint("llama", tie_word_embeddings=tie)) for tie in (False, True))
    assert weight_bytes(tied) == weight_bytes(free) == 4 * sum(p.numel() for p in free.model.parameters())


class Counting(torch.nn.Module):
    """A model that predicts the number of tokens it has read, stored under the name in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def count(self, input_ids: Tensor, known: Any, name: str) -> ModelOutput:
        self.read.append(input_ids.shape[1])
        total = (known or 0) + input_ids.shape[1]
        logits = torch.nn.functional.one_hot(torch.full_like(input_ids, total), VOCABULARY).float()
        return ModelOutput({"logits": logits, name: total} if name else {"logits": logits})


class Newer(Counting):
    def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool = False) -> ModelOutput:
        return self.count(input_ids, cache, "cache")


class Older(Counting):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> ModelOutput:
        return self.count(input_ids, past_key_values, "past_key_values")


class Without(Counting):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> ModelOutput:
        return self.count(input_ids, None, "")


@pytest.mark.parametrize(
    ("model", "name", "read"),
    [(Newer(), "cache", [2, 1, 1]), (Older(), "past_key_values", [2, 1, 1]), (Without(), None, [2, 3, 4])],
    ids=["cache", "past_key_values", "no cache"],
)
def test_cache_is_passed_by_its_name_in_the_signature(model: Counting, name: str | None, read: list[int]) -> None:
    assert cache_argument(model) == name
    step = Continuation(model, torch.device("cpu"))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert [int(step(tokens[:, :length]).argmax()) for length in (2, 3, 4)] == [2, 3, 4]
    assert model.read == read


# ---- tokens of a text


def voice(begin: int | None = BOS, ends: tuple[int, ...] = (EOS,)) -> Voice:
    known = torch.arange(VOCABULARY) < LETTERS
    return Voice(begin, frozenset(ends), known, known & (torch.arange(VOCABULARY) >= len(SPECIAL)))


def always(token: int) -> Callable[[Tensor], Tensor]:
    """A model with probability 1 for the next token."""
    return lambda tokens: 1000.0 * torch.nn.functional.one_hot(torch.full((len(tokens),), token), VOCABULARY)


def uniform(rows: int, length: int) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(0)).double()


def test_special_tokens_are_sampled_only_at_temperature_1() -> None:
    (row,) = write_rows(always(EOS), uniform(1, 40), voice()).tolist()
    hot = self_written.FALLING
    assert row[0] == BOS and all(token >= len(SPECIAL) for token in row[1 : hot + 1])
    assert row[hot + 1 : hot + 3] == [EOS, BOS]  # and the temperature starts again
    assert all(token >= len(SPECIAL) for token in row[hot + 3 : 2 * hot + 3]) and row[2 * hot + 3] == EOS


def test_token_that_ends_and_starts_texts_is_not_doubled() -> None:
    (row,) = write_rows(always(BOS), uniform(1, 30), voice(ends=(BOS,))).tolist()
    assert [position for position, token in enumerate(row) if token == BOS] == [0, 11, 22]


def test_unknown_ids_are_never_sampled() -> None:
    rows = write_rows(always(VOCABULARY - 1), uniform(8, 40), voice())
    assert int(rows.max()) < LETTERS


def test_texts_without_bos_start_with_an_ordinary_token() -> None:
    rows = write_rows(always(9), uniform(200, 2), voice(begin=None))
    assert len(rows[:, 0].unique()) > 100 and int(rows[:, 0].min()) >= len(SPECIAL) and int(rows.max()) < LETTERS


def test_voice_is_read_from_tokenizer_and_config(tokenizer: Any) -> None:
    read = Voice.of(tokenizer, SimpleNamespace(eos_token_id=[7, 8]), VOCABULARY)
    expected = voice(ends=(EOS, 7, 8))
    assert (read.begin, read.ends) == (expected.begin, expected.ends)
    assert torch.equal(read.known, expected.known) and torch.equal(read.ordinary, expected.ordinary)
    bare = Voice.of(without_bos(tokenizer), SimpleNamespace(), VOCABULARY)
    assert bare.begin is None and torch.equal(bare.ordinary, expected.ordinary)


def test_tokenizer_without_bos_is_reported(tokenizer: Any, checkpoint: Checkpoints) -> None:
    writer = author(checkpoint("llama"), without_bos(tokenizer))
    assert writer.write(0, 8, seed=0).shape == (0, 8) and not writer.notes
    assert int(writer.write(2, 8, seed=0)[:, 0].min()) >= len(SPECIAL)
    assert "no beginning-of-text token" in writer.notes[0]


def test_temperature_falls_from_2_to_1() -> None:
    """At temperature t a logit of 2 ln 3 weighs 9^(1/t): 3/4 of two tokens at 2, 9/10 at 1."""
    two = Voice(None, frozenset(), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    logits = torch.tensor([[0.0, 2 * math.log(3)]]).expand(4, 2)
    temperature = torch.tensor([2.0, 2.0, 1.0, 1.0])
    numbers = torch.tensor([0.249, 0.251, 0.099, 0.101], dtype=torch.float64)
    assert draw(logits, temperature, two, numbers).tolist() == [0, 1, 0, 1]


def test_nan_logits_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="NaN"):
        write_rows(lambda tokens: torch.full((len(tokens), VOCABULARY), math.nan), uniform(1, 3), voice())
