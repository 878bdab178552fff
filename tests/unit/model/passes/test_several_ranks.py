"""Ranks that share a text get the statistics of one process, and the first one gets all hidden states at the end."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.distributed.ranks import ALONE, Ranks
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Place, Storage
from llmq.numerics.input_stats import InputStats
from llmq.runtime.open_skeleton import open_skeleton
from tests import builders, mixtures, rank_threads
from tests.passes import CPU_MEMORY, REMEMBERED, REPEATED, run_block, streams_over

TEXT = builders.tokens(14, 24)  # one sequence per batch, so shares have the batches of one process
VALIDATION, PADDED = 2, 8.0  # tokens that an expert takes for each of its inputs: more than it gets
PADDED_PART = 0.2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> list[Skeleton]:
    """A skeleton of the same mixture for each rank."""
    model = builders.save_model(tmp_path_factory.mktemp("mixtral"), builders.causal_model(mixtures.mixtral()))
    return [open_skeleton(Checkpoint.open(model), torch.device("cpu"), torch.float32) for _ in range(3)]


def passed(
    skeletons: list[Skeleton], ranks: Ranks, memory: int, storage: Storage
) -> tuple[dict[str, InputStats], list[Tensor]]:
    """(leader -> statistics in the first block, hidden states of the float stream behind it), on one rank."""
    skeleton = skeletons[ranks.rank]
    streams = streams_over(
        skeleton, TEXT, 1, memory=memory, floats=True, validation=VALIDATION, tokens_per_input=PADDED,
        storage=storage, ranks=ranks,
    )  # fmt: skip
    stats = run_block(streams, skeleton.blocks[0])
    assert streams.floats is not None
    streams.floats.gather(ranks)
    first = ranks.is_first
    return stats, [streams.floats._states.read([s]).clone() for s in range(len(TEXT))] if first else []


@pytest.mark.parametrize("memory", [REMEMBERED, REPEATED])
def test_ranks_get_the_statistics_of_one_process(mixture: list[Skeleton], memory: int) -> None:
    expected, _ = passed(mixture, ALONE, memory, CPU_MEMORY)
    assert any(stats.borrowed > PADDED_PART * stats.tokens for stats in expected.values())
    for stats, _ in rank_threads.run(3, lambda ranks: passed(mixture, ranks, memory, CPU_MEMORY)):
        assert list(stats) == list(expected)
        for leader, own in stats.items():
            assert_close(own, expected[leader])


def assert_close(own: InputStats, expected: InputStats) -> None:
    assert (own.tokens, own.borrowed) == (expected.tokens, expected.borrowed)
    pairs = [(own.second_moment(), expected.second_moment()), (own.cross_moment(), expected.cross_moment()),
             (own.mean_absolute, expected.mean_absolute), (own.drift_moment(), expected.drift_moment())]  # fmt: skip
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    assert (own.validation is None) == (expected.validation is None)
    if own.validation is not None and expected.validation is not None:
        assert_close(own.validation, expected.validation)


@pytest.mark.parametrize("place", [Place.HOST, Place.FILE])
def test_the_first_rank_gets_the_states_of_all(mixture: list[Skeleton], tmp_path: Path, place: Place) -> None:
    def states(ranks: Ranks) -> list[Tensor]:
        storage = Storage(torch.device("cpu"), place, tmp_path / str(ranks.size) / str(ranks.rank))
        return passed(mixture, ranks, REMEMBERED, storage)[1]

    alone, (first, *others) = states(ALONE), rank_threads.run(3, states)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, alone, strict=True))
    assert others == [[], []]
