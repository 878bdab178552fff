"""Gradients block by block are those of the whole model under autograd; keeping graphs changes no bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from llmq.model.passes.stored_states import StoredWindows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes import backward
from llmq.model.passes import forward as walk
from llmq.model.passes.backward import Chain
from llmq.model.passes.forward import Ready
from llmq.steps import kl_loss as loss
from tests.builders import CONFIGS, WINDOW, skeleton_of, tokens

Checkpoints = Callable[..., Path]
LENGTH = 3 * WINDOW  # longer than the window of a sliding layer
# Float32 sums of a few hundred terms in another order; relative to the largest entry of what is compared.
TOLERANCE = 1e-4


def standing(walked: Skeleton) -> Ready:
    """Blocks that are read at once, and stay."""
    for block in walked.blocks:
        block.load()

    @contextmanager
    def ready(index: int) -> Iterator[Block]:
        yield walked.blocks[index]

    return ready


def score(logits: Tensor) -> Tensor:
    """Some loss."""
    return (logits * torch.linspace(-1, 1, logits.shape[-1])).tanh().square().mean()


def gradients(walked: Skeleton, ids: Tensor, *, keep: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The hidden state, and the gradient of each linear layer's weight by its path, a block at a time."""
    ready = standing(walked) if keep else walk.loaded(walked)
    paths = [path for block in walked.blocks for path in block.linears]
    forward = Chain(walked, ready, ids, paths, keep=keep)
    hidden = forward.hidden.requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(walked.logits(ids, hidden)), hidden)
    found: dict[str, Tensor] = {}
    order = []
    for index, block in forward.backward(gradient):
        order.append(index)
        assert not any(linear.weight.requires_grad for linear in block.linears.values())
        for path, linear in block.linears.items():
            assert linear.weight.grad is not None
            found[path] = linear.weight.grad.clone()
    assert order == list(reversed(range(len(walked.blocks))))
    assert all(parameter.grad is None for parameter in walked.model.parameters())
    return hidden.detach(), found


def whole(folder: Path, paths: list[str], ids: Tensor) -> dict[str, Tensor]:
    """The same from transformers' own model and autograd."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    score(model(input_ids=ids, use_cache=False).logits).backward()
    return {path: model.get_parameter(f"{path}.weight").grad for path in paths}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_whole_model(checkpoint: Checkpoints, name: str) -> None:
    folder, ids = checkpoint(name), tokens(2, LENGTH)
    _, found = gradients(skeleton_of(folder), ids, keep=False)
    expected = whole(folder, list(found), ids)
    for path, gradient in found.items():
        assert (gradient - expected[path]).abs().max() <= TOLERANCE * expected[path].abs().max(), path
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma3"])
def test_kept_graphs_give_the_same_bits(checkpoint: Checkpoints, name: str) -> None:
    folder, ids = checkpoint(name), tokens(2, LENGTH)
    kept, again = (gradients(skeleton_of(folder), ids, keep=keep) for keep in (True, False))
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][path], again[1][path]) for path in again[1])


def test_a_block_may_be_changed_once_its_gradients_are_there(checkpoint: Checkpoints) -> None:
    """What the blocks before it get does not depend on it any more."""
    folder, ids = checkpoint("llama"), tokens(1, LENGTH)
    _, expected = gradients(skeleton_of(folder), ids, keep=True)
    walked = skeleton_of(folder)
    forward = Chain(walked, standing(walked), ids, expected.keys(), keep=True)
    hidden = forward.hidden.requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(walked.logits(ids, hidden)), hidden)
    for _, block in forward.backward(gradient):
        for path, linear in block.linears.items():
            assert linear.weight.grad is not None and torch.equal(linear.weight.grad, expected[path])
            block.set_weight(path, torch.full_like(linear.weight, 7.0))


def test_hooks_see_the_gradients_of_outputs(checkpoint: Checkpoints) -> None:
    """Of layers whose weights ask for none, in blocks that run a second time."""
    folder, ids = checkpoint("llama"), tokens(2, LENGTH)
    walked = skeleton_of(folder)
    found: dict[str, Tensor] = {}
    load = walk.loaded(walked)

    @contextmanager
    def watched(index: int) -> Iterator[Block]:
        with load(index) as block:
            handles = [hooked(path, linear, found) for path, linear in block.linears.items()]
            yield block
            for handle in handles:
                handle.remove()

    forward = Chain(walked, watched, ids)
    hidden = forward.hidden.requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(walked.logits(ids, hidden)), hidden)
    for _, block in forward.backward(gradient):
        assert all(linear.weight.grad is None for linear in block.linears.values())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected: dict[str, Tensor] = {}
    for path in found:
        hooked(path, model.get_submodule(path), expected)
    score(model(input_ids=ids, use_cache=False).logits).backward()
    assert len(found) == sum(len(block.linears) for block in walked.blocks)
    for path, of_output in found.items():
        assert (of_output - expected[path]).abs().max() <= TOLERANCE * expected[path].abs().max(), path


def hooked(path: str, linear: nn.Module, into: dict[str, Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Put the gradient of the layer's output into `into`."""

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: into.__setitem__(path, gradient))

    return linear.register_forward_hook(watch)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_text_runs_through_to_the_same_logits(
    checkpoint: Checkpoints, tmp_path: Path, name: str, on_disk: bool
) -> None:
    """Hidden states of windows, read in another order, give the model's logits; also a part at a time."""
    folder, ids = checkpoint(name), tokens(5, LENGTH)
    walked = skeleton_of(folder)
    states = StoredWindows(tmp_path / "states" if on_disk else None)
    numbers = [[0, 1], [2, 3], [4]]
    read, write = (lambda n: states.read(numbers[n])), (lambda n, hidden: states.write(numbers[n], hidden))
    walk.through_blocks(walked, walk.loaded(walked), ids.split(2), read, write)
    order = [3, 0, 4]
    with torch.no_grad():
        found = walked.logits(ids[order], states.read(order))
        part = walked.logits(ids[3:4, 5:9], states.read([3])[..., 5:9, :])
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
    assert (found - expected[order]).abs().max() <= TOLERANCE * expected.abs().max()
    assert (part - expected[3:4, 5:9]).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_loss_of_parts_is_that_of_the_whole(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    walked, ids = skeleton_of(checkpoint("llama")), tokens(3, LENGTH)
    generator = torch.Generator().manual_seed(0)
    expected, hidden = (torch.randn(3, LENGTH, 32, generator=generator) for _ in range(2))
    once, slope = loss.kl_loss(walked, ids, expected, hidden)
    leaf = hidden.clone().requires_grad_(True)
    target, predicted = walked.logits(ids, expected), walked.logits(ids, leaf)
    slow = torch.nn.functional.kl_div(
        predicted.log_softmax(-1).flatten(0, 1), target.log_softmax(-1).flatten(0, 1).detach(),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    assert once == pytest.approx(slow.item(), rel=1e-5)
    torch.testing.assert_close(slope, torch.autograd.grad(slow, leaf)[0], rtol=1e-3, atol=1e-7)
    for at_once in (2 * LENGTH, LENGTH - 7):  # two windows and one; parts of a window
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once * walked.vocabulary)
        total, gradient = loss.kl_loss(walked, ids, expected, hidden)
        assert total == pytest.approx(once, rel=1e-5)
        torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-7)


def test_what_a_graph_holds_is_counted(checkpoint: Checkpoints) -> None:
    """At least the inputs of all linear layers, and no parameter; as much again for twice the tokens."""
    walked = skeleton_of(checkpoint("llama"))
    block = walked.blocks[0]
    block.load()
    sizes = []
    for batch in (2, 4):
        call = walked.record(0, tokens(batch, LENGTH))
        sizes.append(backward.graph_bytes(block, call, [linear.weight for linear in block.linears.values()]))
    inputs = 2 * LENGTH * 4 * (32 + 32 + 32 + 64)  # of q, k, v; o; gate, up; down
    assert inputs <= sizes[0] <= 20 * inputs
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.1)
