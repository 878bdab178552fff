"""Token weights, compared with whole-model autograd, sorting and many draws; and their effect on a run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq.algorithms import fisher_weights
from llmq.algorithms.fisher_weights import OutputMetric
from llmq.checkpoint.reader import Checkpoint
from llmq.memory import HOST
from llmq.methods import Method
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import HiddenStates, Place, Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.report.events import Event, Progress
from llmq.runtime.checkpoint_weights import PackedWeights
from llmq.steps import fisher_information as measuring
from llmq.steps.fisher_information import FisherInformation
from tests.builders import WINDOW, skeleton_of, tokens
from tests.passes import run_block, streams_over
from tests.runs import quantize

Checkpoints = Callable[..., Path]
LENGTH = 3 * WINDOW
# Float32 sums of a few hundred terms in another order, squared; relative to the largest.
TOLERANCE = 1e-3


def test_weights_are_clipped_mixed_and_average_to_one() -> None:
    gamma = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    gamma[[7, 8, 9]] = 1e6
    weights = fisher_weights.weights(gamma.reshape(20, 100)).double()
    limit = sorted(gamma.tolist())[1997]  # 0.1 % of 2000 are above
    clipped = [min(value, limit) for value in gamma.tolist()]
    expected = [0.5 + 0.5 * value * len(clipped) / math.fsum(clipped) for value in clipped]
    torch.testing.assert_close(weights.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(fisher_weights.weights(gamma * 1e-6), weights.flatten().float())  # any scale


def test_layers_without_gradients_weight_all_tokens_alike() -> None:
    assert torch.equal(fisher_weights.weights(torch.zeros(3, 5)), torch.ones(3, 5))


def test_labels_are_drawn_as_the_model_predicts() -> None:
    """The slope is p minus a label, so its mean over all draws is zero, and its mean square the Fisher information."""
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


def test_extreme_chances_draw_possible_labels() -> None:
    never = torch.full((5,), -math.inf)
    logits = torch.cat([never, torch.zeros(1000), never]).expand(2, -1)
    labels = fisher_weights.drawn_slope(logits, torch.tensor([0, 1 - 2**-24])).argmin(1)
    assert labels.tolist() == [5, 1004]


def chosen_slope(hidden: Tensor) -> Tensor:
    """Some slope of the loss in the last hidden states."""
    return (hidden * 3).sin()


def measured(skeleton: Skeleton, windows: Tensor, at_once: int) -> FisherInformation:
    return measuring.fisher_information(
        skeleton, windows, lambda _, hidden: chosen_slope(hidden), RecordedCalls(skeleton), batch=2, at_once=at_once
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "neox", "falcon"])
def test_squared_gradients_equal_the_whole_models(checkpoint: Checkpoints, name: str) -> None:
    """For a loss whose gradient in the last hidden states is known."""
    folder, windows = checkpoint(name), tokens(5, LENGTH)
    skeleton = skeleton_of(folder)
    information = measured(skeleton, windows, at_once=4)
    squared = information.linears

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}
    last: list[Tensor] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_: object, __: object, output: Any) -> None:
            outputs[path] = output[0] if isinstance(output, tuple) else output
            outputs[path].retain_grad()

        return hook

    def end(_: object, __: object, output: object) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    model.get_submodule(skeleton.blocks[-1].path).register_forward_hook(end)
    blocks = [block.path for block in skeleton.blocks]
    for path in [*squared, *blocks]:
        model.get_submodule(path).register_forward_hook(keep(path))
    model(input_ids=windows, use_cache=False)
    last[0].backward(chosen_slope(last[0].detach()))
    assert squared.keys() == {path for block in skeleton.blocks for path in block.linears}
    for path, squares in squared.items():
        gradient = outputs[path].grad
        assert gradient is not None
        expected = gradient.double().square().sum(-1).reshape(windows.shape)
        assert (squares - expected).abs().max() <= TOLERANCE * expected.max(), path
        assert squares.max() > 0
    assert information.outputs.keys() == set(range(len(blocks)))
    for index, path in enumerate(blocks):
        gradient = outputs[path].grad
        assert gradient is not None
        rows, importance = gradient.double().flatten(0, -2), information.outputs[index]
        moment = information.moments.read([index])[0]
        expected = rows.square().sum(-1).reshape(windows.shape)
        assert (importance - expected).abs().max() <= TOLERANCE * expected.max(), path
        assert (moment - rows.T @ rows).abs().max() <= TOLERANCE * (rows.T @ rows).abs().max(), path


def test_gradients_do_not_depend_on_the_chunk_size(checkpoint: Checkpoints) -> None:
    windows = tokens(5, LENGTH)
    whole, parts = (measured(skeleton_of(checkpoint("llama")), windows, at_once) for at_once in (100, 1))
    assert all(torch.equal(whole.linears[path], parts.linears[path]) for path in whole.linears)
    assert whole.outputs.keys() == parts.outputs.keys()
    for index, importance in whole.outputs.items():
        assert torch.equal(importance, parts.outputs[index])
        assert torch.equal(whole.moments.read([index]), parts.moments.read([index]))


def test_the_metric_of_outputs_has_a_mean_eigenvalue_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    g, gamma = torch.randn(40, 6, generator=generator), torch.rand(3, 5, generator=generator)
    metric = OutputMetric.of(1e-6 * g.T @ g, gamma)
    assert metric.matrix.diagonal().mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.linalg.eigvalsh(metric.matrix).min() >= 1 - fisher_weights.MATRIX_SHARE - 1e-5
    direction, small = g[0] / g[0].norm(), torch.linalg.eigh(g.T @ g).eigenvectors[:, 0]
    assert direction @ metric.matrix @ direction > small @ metric.matrix @ small

    difference = torch.randn(2, 2, 5, 6, generator=generator, requires_grad=True)  # with a leading dimension
    loss, gradient = metric.loss(difference.detach(), [2, 0])
    weights = fisher_weights.weights(gamma)[[2, 0]]
    expected = torch.einsum("bt,abti,ij,abtj->", weights, difference, metric.matrix, difference)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    (slope,) = torch.autograd.grad(expected, difference)
    torch.testing.assert_close(2 * gradient, slope)


def test_outputs_without_gradients_count_alike() -> None:
    metric = OutputMetric.of(torch.zeros(4, 4), torch.zeros(2, 3))
    assert torch.equal(metric.matrix, torch.eye(4)) and torch.equal(metric.weights, torch.ones(2, 3))


def test_statistics_are_weighted_by_tokens(checkpoint: Checkpoints) -> None:
    """H of each group is Σ γ x xᵀ / Σ γ of what the block is fed; the same for validation sequences."""
    skeleton, windows = skeleton_of(checkpoint("llama")), tokens(5, LENGTH)
    events: list[Event] = []
    information = measuring.measure(skeleton, windows, 3, RecordedCalls(skeleton), on_event=events.append)
    shares = [event.share for event in events if isinstance(event, Progress)]  # a backward pass counts as 3 forwards
    assert shares == pytest.approx([1 / 12, 2 / 12, 3 / 12, 6 / 12, 9 / 12, 1])
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.module.parameters())
    block, streams = (
        skeleton.blocks[0],
        streams_over(skeleton, windows, validation=2, weights=information.token_weights),
    )
    names: dict[str, tuple[str, ...]] = {}
    for leader, stats in run_block(
        streams, block, lambda _, group: names.update({group.names[0]: group.names})
    ).items():
        fed: list[Tensor] = []
        hook = block.linears[leader].register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0]))
        block.run(skeleton.record(0, windows))
        hook.remove()
        gamma = information.token_weights(names[leader])
        assert gamma is not None and gamma.std() > 0.01
        for judge, rows in ((stats, slice(0, 3)), (stats.validation, slice(3, 5))):
            assert judge is not None
            X, counts = fed[0][rows].flatten(0, -2).double(), gamma[rows].flatten().double()
            expected = (X * counts[:, None]).T @ X / counts.sum()
            bound = 1e-4 * float(expected.max())
            torch.testing.assert_close(judge.second_moment().double(), expected, rtol=1e-4, atol=bound)


def test_a_run_with_token_weights_differs_and_repeats(checkpoint: Checkpoints, text: Path, tmp_path: Path) -> None:
    def codes(out: str, method: Method) -> dict[str, Tensor]:
        quantize(checkpoint("llama"), tmp_path / out, text, stages=method)
        packed = PackedWeights(Checkpoint.open(tmp_path / out))
        return {name: packed.read(name).codes for name in packed.modules}

    plain, first = codes("plain", Method("gptq")), codes("first", Method("gptq", token_weights=True))
    again = codes("again", Method("gptq", token_weights=True))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_sums_over_outputs_grow_by_batches_and_parts(tmp_path: Path) -> None:
    """Blocks are visited one after the other, and again for each part of the text."""
    S, T, D = 4, 3, 5
    gradients = torch.randn(2, S, T, D, generator=torch.Generator().manual_seed(0))
    moments = HiddenStates(Storage(HOST, Place.FILE, tmp_path), "moments")
    collected = measuring._Collected(torch.Size((S, T)), moments)
    for part in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        for index in (1, 0):
            for sequence in part:
                collected.take_output(index, sequence[None], gradients[index, sequence][None])
    information = collected.result()
    assert information.overflowed == ()
    for index, importance in information.outputs.items():
        rows = gradients[index].reshape(-1, D)
        torch.testing.assert_close(information.moments.read([index])[0], rows.T @ rows)
        torch.testing.assert_close(importance, gradients[index].square().sum(-1))


def test_gradients_that_overflow_are_left_out_by_name() -> None:
    collected = measuring._Collected(torch.Size((1, 2)), HiddenStates(Storage(HOST), "moments"))
    collected._seen = {"q": [torch.tensor([[1.0, math.inf]])], "k": [torch.ones(1, 2)]}
    collected.take(torch.tensor([0]), tokens_first=False)
    collected.take_output(0, torch.tensor([0]), torch.full((1, 2, 3), 1e30))
    collected.take_output(1, torch.tensor([0]), torch.ones(1, 2, 3))
    information = collected.result()
    assert information.overflowed == ("q", "the output of block 0")
    assert (information.linears.keys(), information.outputs.keys()) == ({"k"}, {1})
