"""How much a token counts: against whole-model autograd, sorting, and a million draws; and what that does to a run."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq.algorithms import fisher_weights
from llmq.checkpoint.reader import Checkpoint
from llmq.methods import Method
from llmq.model.analyse.input_groups import input_groups
from llmq.model.passes.hidden_states import Stream
from llmq.model.passes.squared_gradients import squared_gradients as measure_gradients
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.steps import token_weights as measuring
from tests.builders import WINDOW, skeleton_of, tokens
from tests.runs import quantize

Checkpoints = Callable[..., Path]
LENGTH = 3 * WINDOW
# Float32 sums of a few hundred terms in another order, squared; relative to the largest.
TOLERANCE = 1e-3


def test_weights_are_clipped_mixed_and_one_on_average() -> None:
    gamma = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    gamma[[7, 8, 9]] = 1e6
    found = fisher_weights.weights(gamma.reshape(20, 100)).double()
    limit = sorted(gamma.tolist())[1997]  # 0.1 % of 2000 are above
    clipped = [min(value, limit) for value in gamma.tolist()]
    expected = [0.5 + 0.5 * value * len(clipped) / math.fsum(clipped) for value in clipped]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.mean().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(fisher_weights.weights(gamma * 1e-6), found.flatten().float())  # any scale


def test_a_layer_that_reaches_nothing_leaves_all_tokens_alike() -> None:
    assert torch.equal(fisher_weights.weights(torch.zeros(3, 5)), torch.ones(3, 5))


def test_labels_are_drawn_as_the_model_predicts() -> None:
    """The slope is p minus a label, so its mean over all draws is nothing, and its square the Fisher information."""
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.5, -1.0])
    p = logits.double().softmax(0)
    count = 100_000
    chances = (torch.arange(count) + 0.5) / count  # evenly: the draws are then as frequent as they are likely
    slopes = fisher_weights.drawn_slope(logits.expand(count, -1), chances).double()
    labels = p - slopes
    assert torch.equal(labels.round().sum(1), torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(labels.round().mean(0), p, rtol=0, atol=2 / count)
    assert labels.round()[:, 1].sum() == 0
    fisher = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(slopes.T @ slopes / count, fisher, rtol=0, atol=1e-4)


def test_the_first_and_the_last_chance_are_labels_that_are_possible() -> None:
    never = torch.full((5,), -math.inf)
    logits = torch.cat([never, torch.zeros(1000), never]).expand(2, -1)
    labels = fisher_weights.drawn_slope(logits, torch.tensor([0, 1 - 2**-24])).argmin(1)
    assert labels.tolist() == [5, 1004]


def chosen_labels(hidden: Tensor) -> Tensor:
    """Some slope of the loss in the last hidden states."""
    return (hidden * 3).sin()


@pytest.mark.parametrize("name", ["llama", "gemma3", "neox", "falcon"])
def test_squared_gradients_are_those_of_the_whole_model(checkpoint: Checkpoints, name: str) -> None:
    """Of a loss whose gradient in the last hidden states is known."""
    folder, windows = checkpoint(name), tokens(5, LENGTH)
    walked = skeleton_of(folder)
    found = measure_gradients(walked, windows, lambda _, hidden: chosen_labels(hidden), batch=2, at_once=4)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_: object, __: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[path] = output

        return hook

    def end(_: object, __: object, output: object) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    model.get_submodule(walked.blocks[-1].path).register_forward_hook(end)
    for path in found:
        model.get_submodule(path).register_forward_hook(keep(path))
    model(input_ids=windows, use_cache=False)
    last[0].backward(chosen_labels(last[0].detach()))
    assert found.keys() == {path for block in walked.blocks for path in block.linears}
    for path, squares in found.items():
        gradient = outputs[path].grad
        assert gradient is not None
        expected = gradient.double().square().sum(-1).reshape(windows.shape)
        assert (squares - expected).abs().max() <= TOLERANCE * expected.max(), path
        assert squares.max() > 0


def test_what_is_held_at_once_changes_no_bit(checkpoint: Checkpoints) -> None:
    windows = tokens(5, LENGTH)

    def measured(at_once: int) -> dict[str, Tensor]:
        walked = skeleton_of(checkpoint("llama"))
        return measure_gradients(walked, windows, lambda _, h: chosen_labels(h), batch=2, at_once=at_once)

    whole, parts = measured(100), measured(1)
    assert all(torch.equal(whole[path], parts[path]) for path in whole)


def test_the_model_is_measured_before_and_statistics_are_weighted(checkpoint: Checkpoints) -> None:
    """H of each group is Σ γ x xᵀ / Σ γ of what the block is fed; the same for windows that are held out."""
    walked, windows = skeleton_of(checkpoint("llama")), tokens(5, LENGTH)
    weights = measuring.measure(walked, windows, seed=3)
    assert all(parameter.is_meta for block in walked.blocks for parameter in block.module.parameters())
    stream = Stream(walked, windows, 2, 2**30, held_out=2, weights=weights)
    block = walked.blocks[0]
    block.load()
    groups = input_groups(block, stream.sample(64))
    for group, stats in stream.flow(block, groups).statistics():
        fed: list[Tensor] = []
        hook = block.linears[group.names[0]].register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0]))
        block.run(walked.record(0, windows))
        hook.remove()
        gamma = weights(group.names)
        assert gamma is not None and gamma.std() > 0.01
        for judge, rows in ((stats, slice(0, 3)), (stats.held_out, slice(3, 5))):
            assert judge is not None
            X, counts = fed[0][rows].reshape(-1, group.in_features).double(), gamma[rows].flatten().double()
            expected = (X * counts[:, None]).T @ X / counts.sum()
            torch.testing.assert_close(
                judge.second_moment().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max())
            )


def test_a_run_with_weights_differs_and_repeats(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    def codes(out: str, method: Method) -> dict[str, Tensor]:
        quantize(checkpoint("llama"), tmp_path / out, text, stages=method)
        packed = PackedWeights(Checkpoint.open(tmp_path / out))
        return {name: packed.read(name).codes for name in packed.modules}

    plain, first = codes("plain", Method("gptq")), codes("first", Method("gptq", token_weights=True))
    again = codes("again", Method("gptq", token_weights=True))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)
