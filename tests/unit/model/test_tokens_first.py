"""XLNet's blocks have hidden states (T, B, D); everything outside of the blocks has (B, T, D), in every pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq.memory import HOST
from llmq.model.analyse import input_groups
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import run_through
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.sequential import Sequential
from llmq.model.passes.streams import Text
from llmq.steps import fisher_information, kl_loss
from tests import architectures, builders
from tests.passes import streams_over

LENGTH = 4
IDS = builders.tokens(LENGTH, LENGTH)  # as many sequences as tokens, so that the shape does not tell the two axes apart


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return builders.save_model(tmp_path / "xlnet", builders.causal_model(architectures.tiny("xlnet")))


@pytest.fixture
def skeleton(folder: Path) -> Skeleton:
    return builders.skeleton_of(folder)


def last_states(skeleton: Skeleton, ids: Tensor, batch: int) -> Tensor:
    return run_through(skeleton, Text(ids, batch), Storage(HOST)).last(range(len(ids)))


@pytest.mark.parametrize("batch", [1, 2, LENGTH])
def test_streamed_logits_equal_the_whole_models(folder: Path, skeleton: Skeleton, batch: int) -> None:
    model = type(skeleton.model).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        logits = skeleton.logits(IDS, last_states(skeleton, IDS, batch))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_loss_in_parts_equals_the_loss_at_once(skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = last_states(skeleton, IDS, 2)
    expected = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    once, gradient = kl_loss.kl_loss(skeleton, IDS, expected, hidden)
    assert once > 0 and gradient.norm() > 0
    for sequences in (1, 2):
        monkeypatch.setattr(kl_loss, "LOGITS_AT_ONCE", {"cpu": sequences * LENGTH * skeleton.vocabulary})
        loss, in_parts = kl_loss.kl_loss(skeleton, IDS, expected, hidden)
        assert loss == pytest.approx(once, rel=1e-4)
        torch.testing.assert_close(in_parts, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def squared_gradients(skeleton: Skeleton, batch: int) -> dict[str, Tensor]:
    measured = fisher_information.fisher_information(
        skeleton, IDS, lambda _, hidden: hidden.sin(), RecordedCalls(skeleton), batch=batch, at_once=LENGTH
    )
    assert measured.outputs.keys() == set(range(len(skeleton.blocks)))
    tensors = dict(measured.linears)
    for index, importance in measured.outputs.items():
        tensors |= {f"{index}.importance": importance, f"{index}.moment": measured.moments.read([index])}
    return tensors


def test_token_weights_do_not_depend_on_the_batch(skeleton: Skeleton) -> None:
    alone, together = squared_gradients(skeleton, 1), squared_gradients(skeleton, 2)
    assert alone and alone.keys() == together.keys()
    for path, weights in alone.items():
        assert weights.std() > 0
        torch.testing.assert_close(together[path], weights, rtol=1e-3, atol=1e-3 * float(weights.max()))


def test_weighted_statistics_do_not_depend_on_the_batch(skeleton: Skeleton) -> None:
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0))
    block = skeleton.blocks[0]
    block.load()

    def grams(batch: int) -> list[Tensor]:
        streams = streams_over(skeleton, IDS, batch, weights=lambda paths: weights)
        groups, sums = input_groups.input_groups(block, streams.quantized.sample(LENGTH)), list[Tensor]()

        with Sequential(block, groups, streams) as forwards:
            forwards.run(lambda turn: sums.extend(stats.second_moment() for _, stats in turn))
        return sums

    for alone, together in zip(grams(1), grams(2), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
