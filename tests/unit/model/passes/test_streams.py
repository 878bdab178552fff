"""Streams: how a text is split, and what a stream reads and writes when it passes blocks, for all storage places."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.memory import HOST
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.streams import Stream, Text
from tests.builders import skeleton_of, tokens
from tests.passes import states_of, stream_over

Checkpoints = Callable[..., Path]
LENGTH = 24


@pytest.mark.parametrize(
    ("sequences", "batch", "validation", "batches", "fitted_batches"),
    [
        (5, 2, 0, [(0, 2), (2, 4), (4, 5)], 3),
        (5, 2, 1, [(0, 2), (2, 4), (4, 5)], 2),
        (5, 2, 2, [(0, 2), (2, 3), (3, 5)], 2),
        (5, 8, 2, [(0, 3), (3, 5)], 1),
        (4, 1, 3, [(0, 1), (1, 2), (2, 3), (3, 4)], 1),
        (1, 4, 0, [(0, 1)], 1),
    ],
)
def test_no_batch_has_both_fitted_and_validation_sequences(
    sequences: int, batch: int, validation: int, batches: list[tuple[int, int]], fitted_batches: int
) -> None:
    text = Text(tokens(sequences, LENGTH), batch, validation)
    assert text.batches() == [range(*ends) for ends in batches]
    assert (text.sequences, text.fitted, text.length) == (sequences, sequences - validation, LENGTH)
    assert text.fitted_batches == fitted_batches
    assert all(max(own) < text.fitted for own in text.batches()[:fitted_batches])
    assert all(min(own) >= text.fitted for own in text.batches()[fitted_batches:])


def test_tokens_are_selected_by_sequence_number() -> None:
    text = Text(tokens(5, LENGTH), 2)
    for numbers in (range(1, 4), [1, 2, 3], [4, 0], range(4, -1, -2)):
        assert torch.equal(text.of(numbers), text.tokens[list(numbers)])


def whole_model(skeleton: Skeleton, ids: Tensor) -> list[Tensor]:
    """(…, S, T, D) what each block puts out, all sequences at once."""
    outputs = []
    for block in skeleton.blocks:
        call = skeleton.record(block.index, ids)
        outputs.append(block.run(call.with_hidden(outputs[-1]) if outputs else call))
    return outputs


@pytest.fixture(params=[Place.HOST, Place.FILE], ids=lambda place: place.name)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(HOST, request.param, tmp_path / "states")


def loaded(folder: Path) -> Skeleton:
    skeleton = skeleton_of(folder)
    for block in skeleton.blocks:
        block.load()
    return skeleton


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3n"])
def test_a_stream_passes_all_blocks(checkpoint: Checkpoints, storage: Storage, name: str, keep: bool) -> None:
    """Sequence by sequence, so that sums are the same whoever asks; with and without what each block was fed."""
    skeleton, ids = loaded(checkpoint(name)), tokens(3, LENGTH)
    alone = [whole_model(skeleton, ids[[number]]) for number in range(3)]
    stream = stream_over(skeleton, ids, batch=1, storage=storage)
    for block in skeleton.blocks:
        fed = [stream.call([number]).hidden.clone() for number in range(3)]
        assert not stream.has_outputs
        if keep:
            stream.keep_inputs()
            stream.keep_inputs()  # which changes nothing
        stream.run(block)
        assert stream.has_outputs
        for number in range(3):
            assert torch.equal(stream.outputs([number]), alone[number][block.index])
            if keep:
                assert torch.equal(stream.call([number]).hidden, fed[number])
        stream.advance()
        assert stream.position == block.index + 1
    assert torch.equal(stream.last([2, 0]), torch.cat([alone[2][-1], alone[0][-1]], dim=-3))
    if storage.folder is not None and storage.place is Place.FILE:
        assert len(list(storage.folder.iterdir())) == 1, "no file is left behind"
        stream.clear()
        assert not list(storage.folder.iterdir())


def test_clear_frees_inputs_and_outputs(checkpoint: Checkpoints, storage: Storage, tmp_path: Path) -> None:
    skeleton = loaded(checkpoint("llama"))
    stream = stream_over(skeleton, tokens(4, LENGTH), storage=storage)
    stream.past(skeleton.blocks[0])
    stream.keep_inputs()
    stream.run(skeleton.blocks[1])
    assert len(list(tmp_path.glob("states/*"))) == (2 if storage.place is Place.FILE else 0)
    stream.clear()
    assert not stream.has_outputs and not stream._states._parts and not list(tmp_path.glob("states/*"))


def test_outputs_replace_inputs(checkpoint: Checkpoints, storage: Storage) -> None:
    """So a stream that keeps no inputs takes no more than the states of all sequences."""
    skeleton = loaded(checkpoint("llama"))
    stream = stream_over(skeleton, tokens(4, LENGTH), storage=storage)
    stream.past(skeleton.blocks[0])
    stream.write(range(2), torch.zeros(2, LENGTH, 32))
    assert not stream.outputs(range(2)).any() and stream.call([2, 3]).hidden.any()
    assert stream._next is stream._states


def test_unneeded_last_outputs_are_not_computed(checkpoint: Checkpoints) -> None:
    skeleton = loaded(checkpoint("llama"))
    stream = stream_over(skeleton, tokens(4, LENGTH), to_the_end=False)
    for block in skeleton.blocks:
        assert stream.needs_outputs == (block.index < 2)
        stream.past(block)
    with pytest.raises(AssertionError):
        stream.last([0])


def test_last_states_exist_only_after_the_last_block(checkpoint: Checkpoints) -> None:
    skeleton = loaded(checkpoint("llama"))
    stream = stream_over(skeleton, tokens(4, LENGTH))
    stream.past(skeleton.blocks[0])
    with pytest.raises(AssertionError):
        stream.last([0])
    with pytest.raises(AssertionError):
        stream.outputs([0])


@pytest.mark.parametrize("passed", [0, 1])
def test_samples_are_parts_of_the_text(checkpoint: Checkpoints, passed: int) -> None:
    skeleton = loaded(checkpoint("llama"))
    stream = stream_over(skeleton, tokens(5, LENGTH), validation=2)
    for block in skeleton.blocks[:passed]:
        stream.past(block)

    def hidden(numbers: list[int], length: int = LENGTH) -> Tensor:
        return stream.call(numbers).hidden[:, :length]

    assert torch.equal(stream.sample(10).hidden, hidden([0], 10))
    assert torch.equal(stream.sample(LENGTH + 1).hidden, hidden([0, 1]))
    assert torch.equal(stream.sample(10 * LENGTH).hidden, hidden([0, 1])), "no more than a batch"
    for wanted, numbers in ((1, [3]), (LENGTH + 1, [3, 4]), (10 * LENGTH, [3, 4])):
        call = stream.validation_sample(wanted)
        assert call is not None and torch.equal(call.hidden, hidden(numbers))
    assert [len(call.hidden) for call in stream.calls()] == [2, 1, 2]
    assert [len(call.hidden) for call in stream.fitted_calls()] == [2, 1]
    assert stream_over(skeleton, tokens(5, LENGTH)).validation_sample(1) is None


def test_streams_of_one_folder_do_not_mix(checkpoint: Checkpoints, tmp_path: Path) -> None:
    skeleton = loaded(checkpoint("llama"))
    storage = Storage(HOST, Place.FILE, tmp_path)
    calls, texts = (
        stream_over(skeleton, tokens(2, LENGTH)).recorded,
        [Text(tokens(2, LENGTH, seed=seed), 2) for seed in (1, 2)],
    )
    streams = [Stream(skeleton, text, calls, storage, name) for text, name in zip(texts, ("one", "two"), strict=True)]
    for block in skeleton.blocks:
        for stream in streams:
            stream.past(block)
    for text, stream in zip(texts, streams, strict=True):
        alone = stream_over(skeleton, text.tokens)
        for block in skeleton.blocks:
            alone.past(block)
        assert torch.equal(states_of(stream)[0], states_of(alone)[0])
